"""The one kind of error that is the reader's to cure."""


class UserError(Exception):
    """A problem that the reader can cure. Its text is one line that names the value and the cure.

    Entry points print that line without a traceback and exit with status 2.
    """
