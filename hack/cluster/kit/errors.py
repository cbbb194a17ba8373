"""The kit's error tree: KitError > MissingTool, BuildFailed, StartFailed."""


class KitError(Exception):
    """A failure that the user can act on; the message says what to do."""


class MissingTool(KitError):
    """A program, a package source or disk space that the kit needs is not there."""


class BuildFailed(KitError):
    """A binary could not be built or unpacked."""


class StartFailed(KitError):
    """The cluster did not become ready; the message ends with the last log lines."""
