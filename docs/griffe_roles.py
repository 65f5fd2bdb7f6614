"""Turn the Sphinx roles of docstrings, such as ``:class:`Detector```, into links of mkdocstrings."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrite each docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Replace the roles of one object's docstring."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(lambda match: _link(*match.groups(), obj), obj.docstring.value)


def _link(short: str, target: str, obj: griffe.Object) -> str:
    """Return a link to an object of this library, or code where it points elsewhere."""
    try:
        path = target if target.startswith("conditional_detr") else obj.resolve(target)
    except griffe.NameResolutionError:
        return f"`{target}`"
    name = target.rsplit(".", 1)[-1] if short else target
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
