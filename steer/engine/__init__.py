"""Steering vectors in vLLM: several sets at once, chosen by each request, changed while the engine runs."""

from steer.engine.client import DEFAULT, Server, names, push, remove, request, verify

__all__ = ["DEFAULT", "Server", "names", "push", "remove", "request", "verify"]
