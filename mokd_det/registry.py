# Copyright (c) The mokd_det authors.
"""A registry whose error helps. It needs nothing but Python, as `balancing` and `subspace` do."""

__all__ = ["Registry"]


class Registry:
    """
    Objects by name, as Detectron2's registries.

    Args:
        name (str): of the registry, for messages.
        option (str): the config key that selects from it, for messages.
    """

    def __init__(self, name, option):
        self.name = name
        self.option = option
        self._objects = {}

    def register(self, name):
        """Return a decorator that registers a class or function under ``name``."""

        def decorator(obj):
            if name in self._objects:
                raise KeyError(f"{self.name} has an object named '{name}' already.")
            self._objects[name] = obj
            return obj

        return decorator

    def get(self, name):
        """Return the object called ``name``; ValueError with the known names if there is none."""
        if name not in self._objects:
            raise ValueError(
                f"{self.option} is '{name}', which is not in {self.name}: expected one of "
                f"{', '.join(map(repr, self))}."
            )
        return self._objects[name]

    def __contains__(self, name):
        return name in self._objects

    def __iter__(self):
        return iter(sorted(self._objects))
