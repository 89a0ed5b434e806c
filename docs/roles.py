# Copyright (c) The mokd_det authors.
"""Docstrings name things as Sphinx does, :class:`Rule`; the API page is Markdown: `Rule`."""

import re

import griffe


class Roles(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
