"""The HTTP side of the worker: the OpenAI API on one port, operations on the other."""
