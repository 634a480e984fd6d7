"""A Django project that shows KanthorQ at work."""
