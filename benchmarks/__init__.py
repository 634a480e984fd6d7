"""KanthorQ measured beside other task systems: ``make bench``, described in docs/performance.md."""
