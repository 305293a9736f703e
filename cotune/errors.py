"""Every error cotune raises on purpose. Each message is one readable sentence plus the fix.

The command line prints the message and maps the class to an exit code; anything else is a bug and keeps
its traceback.
"""


class CotuneError(Exception):
    """A run could not do what was asked (exit code 1)."""


class UsageError(CotuneError):
    """The request itself is wrong: a flag, a config key, a file that is not there (exit code 2)."""


class DataError(CotuneError):
    """Rows that cannot be read, lack a column, or overlap between splits (exit code 2)."""


class BudgetExhausted(CotuneError):
    """The next piece of tuning work would exceed the budget; strategies catch this and keep their best."""


class NoData(CotuneError):
    """A weights stage found nothing to train on. A reported outcome of the run ("-"), not a crash (sheet 01)."""


class RunLocked(CotuneError):
    """Another process is working on this run folder."""
