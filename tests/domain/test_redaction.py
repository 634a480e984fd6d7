"""Values under secret keys are not shown, whatever text they stand in."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kanthorq_django.domain.redaction import REPLACEMENT, NotRestorable, redact, restore
from kanthorq_django.domain.secret_keys import first_mention

KEYS = ("password", "token", "authorization", "api_key", "card", "private_key", "pin")
HIDDEN = REPLACEMENT
PEM = "-----BEGIN RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    "name",
    ["password", "PASSWORD", "db_password", "dbPassword", "apiKey", "X-API-Key", "APIKey"],
)
def test_a_key_is_meant_however_it_is_written(name: str):
    text = f'{{"{name}": "hunter2", "other": 1}}'
    assert redact(text, KEYS) == f'{{"{name}": "{REPLACEMENT}", "other": 1}}'


@pytest.mark.parametrize(
    "name", ["apikey", "tokens", "card.number", "Authorization", "pass\\u0077ord"]
)
def test_a_key_is_meant_in_the_plural_and_in_disguise(name: str):
    text = f'{{"{name}": "hunter2"}}'
    assert redact(text, KEYS) == f'{{"{name}": "{REPLACEMENT}"}}'


@pytest.mark.parametrize(
    "name",
    [
        *("password1", "new_password2", "newPassword2", "token1", "tokens2", "pin1", "api2_key"),
        *("PGPASSWORD", "DB_MYPASSWORD", "PGPASSWORD2", "dbpassword", "accesstoken", "MY_APIKEY"),
    ],
)
def test_a_key_is_meant_with_a_number_and_run_together_with_what_it_is_for(name: str):
    assert redact(f'{{"{name}": "hunter2"}}', KEYS) == f'{{"{name}": "{HIDDEN}"}}'
    assert redact(f"user=ann\n{name}=hunter2", KEYS) == f"user=ann\n{name}={HIDDEN}"
    assert redact(f"<{name}>hunter2</{name}>", KEYS) == f"<{name}>{HIDDEN}</{name}>"
    assert redact(f"x --{name} hunter2", KEYS) == f"x --{name} {HIDDEN}"
    assert first_mention(f"\xff{name}".encode("latin-1"), KEYS)


def test_a_key_that_ends_in_a_number_is_meant_by_it():
    keys = ("oauth2", "line2_code")
    text = '{"oauth2": 1, "my-oauth2": 1, "line2Code3": 1, "oauth": 2, "oauth3": 2, "line_code": 2}'
    assert redact(text, keys).count(HIDDEN) == 3
    assert redact(text, keys).endswith('"oauth": 2, "oauth3": 2, "line_code": 2}')


@pytest.mark.parametrize(
    "name",
    [
        *("discard", "cardinality", "tokenizer", "key", "api", "pass"),
        *("discard1", "tokenizer2", "passworded", "PASSWORDLESS", "spin1", "WILDCARD", "auto_ken"),
    ],
)
def test_a_word_that_only_contains_a_key_is_shown(name: str):
    for text in (f'{{"{name}": "visible"}}', f"{name}=visible", f"<{name}>visible</{name}>"):
        assert redact(text, KEYS) == text


def test_values_are_replaced_at_any_depth_and_whatever_they_are():
    body = [{"a": {"card": {"number": [1, {"x": 2}]}, "b": [{"token": None}, {"token": 17}]}}]
    told = json.loads(redact(json.dumps(body), KEYS))
    hidden = REPLACEMENT
    assert told == [{"a": {"card": hidden, "b": [{"token": hidden}, {"token": hidden}]}}]


def test_everything_else_stays_as_it_was_written():
    text = '{ "n": 1e400,\n "n": 12345678901234567890, "t\\u00e9": "\\"note\\": 1" }'
    assert redact(text, KEYS) == text


@pytest.mark.parametrize("cut", range(14, 44))
def test_json_that_is_cut_off_shows_no_part_of_a_secret(cut: int):
    text = '{"password": "hunter2 is mine {[", "a": 1}'[:cut]
    assert "hunter" not in redact(text, KEYS)
    assert "mine" not in redact(text, KEYS)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("user=a&password=hunter2&x=1", f"user=a&password={REPLACEMENT}&x=1"),
        ("Authorization: Bearer abc\nHost: x", f"Authorization: {REPLACEMENT}\nHost: x"),
        ("user=a password=hunter2", f"user=a password={REPLACEMENT}"),
        ("no secrets: here", "no secrets: here"),
    ],
)
def test_text_that_is_no_json_is_redacted_line_by_line(text: str, shown: str):
    assert redact(text, KEYS) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{'password': 'hunter2'}", f"{{'password': {HIDDEN}"),
        ('headers["Authorization"] = x', f'headers["Authorization"] = {HIDDEN}'),
        ("password => hunter2", f"password => {HIDDEN}"),
        ("token:\n  hunter2\n\n  more\nuser: a", f"token:{HIDDEN}\nuser: a"),
        ("a:\n  token: |\n    hunter2\n  user: b", f"a:\n  token: {HIDDEN}\n  user: b"),
        ("if token:\n    x\nelse", f"if token:{HIDDEN}\nelse"),
        ("<user>a</user><pin>17</pin>", f"<user>a</user><pin>{HIDDEN}</pin>"),
        ('<ns:pin a="b"><x>17</x></ns:pin>!', f'<ns:pin a="b">{HIDDEN}</ns:pin>!'),
        ("<pin>17", f"<pin>{HIDDEN}"),
        ("mysql --password hunter2 -v", f"mysql --password {HIDDEN} -v"),
        ("['mysql', '--password', 'hunter2']", f"['mysql', '--password', '{HIDDEN}']"),
        ("postgres://ann:hunter2@db/x", f"postgres://ann:{HIDDEN}@db/x"),
        (f"{PEM}\nhunter2\n-----END", f"{PEM}{HIDDEN}-----END"),
        (f"{PEM}\nhunter2", f"{PEM}{HIDDEN}"),
        (
            'form-data; name="pin"\r\n\r\nhunter2\r\n--x\r\n',
            f'form-data; name="pin"\r\n\r\n{HIDDEN}\n--x\r\n',
        ),
        (
            "Key (email, token)=(a@b.example, abc) already exists.",
            f"Key (email, token)={HIDDEN}",
        ),
        ("Key (token, email)=(abc, a@b.example)", f"Key (token, email)=({HIDDEN}"),
    ],
)
def test_other_forms_of_text_are_redacted_too(text: str, shown: str):
    assert redact(text, KEYS) == shown
    assert json.loads(redact(json.dumps({"said": text, "x": 1}), KEYS)) == {"said": shown, "x": 1}


@pytest.mark.parametrize(
    "text",
    [
        "<p>no <b>secret</b></p>",
        "https://example.com/a:b@c",
        "mysql --verbose x",
        "Key (email)=(a@b.example) already exists.",
        '  File "/app/token.py", line 3, in pin\n    return pin(card)',
    ],
)
def test_text_without_a_secret_is_shown_as_it_is(text: str):
    assert redact(text, KEYS) == text


def test_secrets_known_by_their_form_are_shown_where_their_key_is_no_secret():
    text = f"postgres://ann:hunter2@db/x {PEM} hunter2"
    assert redact(text, ("token",)) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("TokenError: it expired", "TokenError: it expired"),
        ("shop.CardDeclined: no funds", "shop.CardDeclined: no funds"),
        ("  x\njwt.InvalidTokenError: token=a", f"  x\njwt.InvalidTokenError: token={HIDDEN}"),
        ("Token: abc", f"Token: {HIDDEN}"),
        ("api_token: abc", f"api_token: {HIDDEN}"),
    ],
)
def test_the_name_of_an_exception_is_no_key(text: str, shown: str):
    assert redact(text, KEYS, is_error=True) == shown


def test_json_in_a_string_of_json_is_redacted():
    inner = json.dumps({"password": "hunter2", "log": json.dumps({"pin": 17})})
    told = json.loads(redact(json.dumps({"payload": inner, "n": 1}), KEYS))
    assert json.loads(told["payload"])["password"] == HIDDEN
    assert "17" not in told["payload"]
    assert told["n"] == 1


@pytest.mark.parametrize(
    ("data", "end"),
    [
        (b"\xff\x81\xa8password\xa7hunter2", 11),
        (b"\xffmyPassword", 11),
        (b"\xa1hpasswordghunter2", 10),
        ("\ufeffpassword=hunter2".encode("utf-16-le"), 17),
        (b"\xff pin 17", 5),
        (b"\xffapi-key", 8),
        (b"\xffshipping discarded", None),
        (b"\x00\x00", None),
        (b"", None),
    ],
)
def test_a_key_is_found_in_bytes_that_are_no_text(data: bytes, end: int | None):
    assert first_mention(data, KEYS) == end


def test_lines_of_json_are_redacted():
    text = '{"token": "a b", "x": 1}\n{"token": {"deep": "c"}}'
    told = redact(text, KEYS)
    assert "a b" not in told
    assert "deep" not in told


PIECES = (
    *("a", '"', "[", "\\", "\n", "\n ", "token=&", "token:\n", "token:\n\n", "<pin>", "<pin "),
    *("://a:", "Key (pin", "(pin)=(", "--pin ", "Aa", "\nAa", "a.", PEM, '"a=b",', "token|"),
    'form-data; name="pin"\n',
    'form-data; name="pin"\n\n',
)


def processor_seconds(piece: str, size: int) -> float:
    text = piece * (size // len(piece))
    began = time.thread_time()
    for each in (text, json.dumps([text]), json.dumps([piece] * (size // 2 // len(piece)))):
        redact(each, KEYS, is_error=True)
    first_mention(text.encode(), KEYS)
    return time.thread_time() - began


@pytest.mark.parametrize("piece", PIECES)
def test_what_a_text_takes_grows_with_its_length_only(piece: str):
    short, long = processor_seconds(piece, 20_000), processor_seconds(piece, 160_000)
    assert long < 30 * short, "64 times as much is what its square would take"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(secret=VALUES, around=VALUES)
def test_any_json_stays_json_with_the_secret_gone(secret: object, around: object):
    for text in (
        json.dumps({"x": [around, {"password": secret}], "y": around}),
        json.dumps({"password": secret, "y": 1}, ensure_ascii=False, indent=2),
    ):
        told = json.loads(redact(text, ("password",)))
        hidden = told.get("password") or told["x"][1]["password"]
        assert hidden == REPLACEMENT


STORED = """{"user": "ann",
 "n": 1e400, "db": {"password": "hun\\u0074er2"}, "url": "https://x/?token=abc&a=1",
 "list": [{"token": 1}, {"token": 2}], "card": {"number": [1]}}"""


def shown_of(stored: str) -> str:
    return redact(stored, KEYS)


def test_what_comes_back_as_it_was_shown_is_what_is_stored():
    assert HIDDEN in shown_of(STORED)
    assert restore(shown_of(STORED), STORED, KEYS) == STORED


def test_what_is_changed_around_a_secret_leaves_the_secret():
    stored = json.dumps({"user": "ann", "db": {"password": "hunter2", "x": 1}, "card": {"n": [1]}})
    changed = shown_of(stored).replace('"ann"', '"bob"').replace('"x": 1', '"y": [2]')
    told = json.loads(restore(changed, stored, KEYS))
    assert told == {"user": "bob", "db": {"password": "hunter2", "y": [2]}, "card": {"n": [1]}}


def test_a_string_around_a_secret_is_restored_as_it_was_shown():
    stored = json.dumps({"url": "https://x/?token=abc&a=1", "n": 1})
    changed = shown_of(stored).replace('"n": 1', '"n": 2')
    assert json.loads(restore(changed, stored, KEYS))["url"].endswith("token=abc&a=1")
    with pytest.raises(NotRestorable, match=r"^\$\.url$"):
        restore(changed.replace("a=1", "a=2"), stored, KEYS)


def test_a_secret_that_is_written_out_or_taken_away_is_not_restored():
    stored = json.dumps({"token": "old", "card": 1, "n": 1})
    given = json.dumps({"token": "new", "card": HIDDEN, "n": 2})
    assert json.loads(restore(given, stored, KEYS)) == {"token": "new", "card": 1, "n": 2}
    assert restore('{"n": 2}', stored, KEYS) == '{"n": 2}'


@pytest.mark.parametrize(
    ("given", "stored", "place"),
    [
        ({"token": HIDDEN}, {}, r"\$\.token"),
        ({"password": HIDDEN}, {"token": "x"}, r"\$\.password"),
        ({"a": {"token": HIDDEN}}, {"token": "x"}, r"\$\.a\.token"),
        ({"note": HIDDEN}, {"note": "x"}, r"\$\.note"),
        ({HIDDEN: 1}, {"token": 1}, "a key"),
        ([{"token": HIDDEN}, 1], [{"token": "x"}, 2], r"\$\[0\]\.token"),
        ({"a": [1, [HIDDEN]]}, {"a": [1, ["pin=1"]]}, r"\$\.a\[1\]\[0\]"),
        (HIDDEN, "pin=1", r"\$"),
    ],
)
def test_a_replacement_that_stands_for_nothing_clear_is_refused(
    given: object, stored: object, place: str
):
    with pytest.raises(NotRestorable, match=f"^{place}$"):
        restore(json.dumps(given), json.dumps(stored), KEYS)


def test_items_of_a_list_that_change_places_do_not_change_secrets():
    stored = json.dumps([{"id": 1, "token": "A"}, {"id": 2, "token": "B"}])
    swapped = json.dumps([{"id": 2, "token": HIDDEN}, {"id": 1, "token": HIDDEN}])
    with pytest.raises(NotRestorable):
        restore(swapped, stored, KEYS)


def test_a_key_that_stands_twice_is_not_restored():
    with pytest.raises(NotRestorable):
        restore(f'{{"token": "{HIDDEN}", "n": 2}}', '{"token": 1, "token": 2, "n": 1}', KEYS)


def test_text_around_a_secret_is_not_restored_once_it_is_changed():
    assert restore(f"user=a pin={HIDDEN}", "user=a pin=17", KEYS) == "user=a pin=17"
    assert restore("user=b pin=18", "user=a pin=17", KEYS) == "user=b pin=18"
    with pytest.raises(NotRestorable, match="a text that was changed"):
        restore(f"user=b pin={HIDDEN}", "user=a pin=17", KEYS)


@given(stored=VALUES, around=VALUES)
def test_any_json_comes_back_from_what_was_shown_of_it(stored: object, around: object):
    text = json.dumps({"password": stored, "x": around, "url": "x?token=y"})
    assert restore(redact(text, ("password", "token")), text, ("password", "token")) == text


FORMS = (
    "password=hunter2",
    "password: hunter2",
    '{"password": "hunter2"}',
    "{'password': 'hunter2'}",
    "<password>hunter2</password>",
    "x --password hunter2",
    "postgres://a:hunter2@b/c",
    "Key (password)=(hunter2)",
    "password:\n  hunter2",
    f"{PEM}\nhunter2\n-----END",
)
AROUND = st.text() | st.text(alphabet="\"'{}[]:,=<>/\\ \n\r\t-&()@password")


@given(before=AROUND, form=st.sampled_from(FORMS), after=AROUND, is_error=st.booleans())
@settings(max_examples=200, deadline=None)
def test_no_text_around_a_secret_brings_it_to_light(
    before: str, form: str, after: str, is_error: bool
):
    text = f"{before}\n{form}\n{after}"
    assert "hunter2" not in redact(text, KEYS, is_error=is_error)
    assert "hunter2" not in redact(json.dumps({"x": text}), KEYS, is_error=is_error)
