"""An error of training code's own. Who passes it on loads this module, and so nothing heavy."""


class OutOfPatience(Exception):
    """Something took too long."""
