"""A hermetic local Kubernetes for tests and demos, in namespaces of its own.

Standard library only: it runs with the system's python3 before any virtual environment exists.
"""
