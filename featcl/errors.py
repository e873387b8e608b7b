"""The one error type that is meant to be read by users."""


class FeatclError(ValueError):
    """Bad input: one line that names what, where (file, line, key, layer), and what would be right.

    The command line prints it to standard error and exits with 2.
    """
