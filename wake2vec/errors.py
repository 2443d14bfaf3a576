"""What can go wrong, and who can mend it.

WakeError        the user can mend it: message without a traceback, exit code 1
Stopped          a signal asked the run to end: everything is saved, exit code 75
"""


class WakeError(Exception):
    """Say where, what is wrong with both values, and what to do."""


class Stopped(Exception):  # noqa: N818 - not an error: the run ends well
    """Leave an unfinished step or evaluation because a signal asked for it."""
