"""What the targets of the Makefile do that nobody sees fail."""

import shutil
import subprocess

from django.conf import settings

# A wheel is not built here: that would need an index. It would be, if nothing lay in its way.
PYTHON = "#!/bin/sh\ntest ! -e build\n"


def test_no_wheel_holds_what_an_earlier_build_left(tmp_path):
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(settings.BASE_DIR / name, tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(PYTHON)
    (programs / "python").chmod(0o755)
    (tmp_path / ".venv" / ".ready").touch()
    left = tmp_path / "build" / "lib" / "kanthorq_django" / "moved_away.py"
    left.parent.mkdir(parents=True)
    left.touch()

    # Told again, as a `make test` around this one hands its own down.
    subprocess.run(["make", "wheel", "VENV=.venv"], cwd=tmp_path, check=True, timeout=30)
    assert not left.exists()
