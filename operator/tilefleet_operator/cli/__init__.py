"""Two command lines: ``tilefleet`` (run, crd, plan) and the kubectl plugin ``kubectl tilefleet``.

Each command is one module with ``add`` (its flags) and a function that runs it. A module imports
what it needs when the command runs, so that ``plan`` and ``crd`` load neither kopf nor a client.
"""
