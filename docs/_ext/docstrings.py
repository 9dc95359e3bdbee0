"""Docstrings as this package writes them, and its names as the API reference lists them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sphinx.addnodes import desc_signature, pending_xref
from sphinx.ext.napoleon import NumpyDocstring

if TYPE_CHECKING:
    from docutils.nodes import Element, document
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

# From where users import names; a name's home is a file below.
PUBLIC = (
    "mixscvi",
    "mixscvi.mixture",
    "mixscvi.images",
    "mixscvi.model",
    "mixscvi.module",
    "mixscvi.likelihoods",
    "mixscvi.pl",
    "mixscvi.datasets",
    "mixscvi.engines",
    "mixscvi.system",
)


# What annotations call other projects' names.
ALIASES = {
    "AnnData": "anndata.AnnData",
    "Distribution": "torch.distributions.Distribution",
    "SCVI": "scvi.model.SCVI",
    "Tensor": "torch.Tensor",
    "np.ndarray": "numpy.ndarray",
    "pd.DataFrame": "pandas.DataFrame",
}


def _returns_as_prose(self: NumpyDocstring, section: str) -> list[str]:
    """Say what is returned in words: the annotation has the type."""
    lines = self._dedent(self._consume_to_next_section())
    if lines[0] == ":":  # a hint to napoleon, from sphinx-autodoc-typehints
        del lines[0]
    return [*self._format_block(":returns: ", lines), ""]


_lines = NumpyDocstring.lines


def _line_by_line(self: NumpyDocstring) -> list[str]:
    """Split what napoleon keeps as one line: the type returned is put at the number of a line."""
    return [line for lines in _lines(self) for line in lines.split("\n")]


def _attribute_in_words(self: NumpyDocstring) -> list[str]:
    """Take what is said of an attribute as it is: a colon in it does not set off a type."""
    return self._consume_to_end()


def _set_fields_apart(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Put an empty line between a directive and the type that is returned, added right after."""
    for place in reversed(range(1, len(lines))):
        if lines[place].startswith(":rtype:") and lines[place - 1].strip():
            if not lines[place - 1].startswith((":", " ")):
                lines.insert(place, "")


def _skip_inherited(
    app: Sphinx, what: str, name: str, member: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out what a class inherits from other projects."""
    function = getattr(member, "fget", member)
    module = getattr(function, "__module__", None)
    return True if module and not module.startswith("mixscvi") else None


def _without_mixins(app: Sphinx, name: str, member: type, options: Any, bases: list) -> None:
    """Name the bases that mean something to users."""
    names = [getattr(base, "__name__", "") for base in bases]
    bases[:] = [
        base
        for base, name in zip(bases, names, strict=True)
        if base is not object
        and not name.startswith("_")
        and not name.endswith(("Mixin", "WithoutData"))
    ] or [object]


def _in_full(app: Sphinx, doctree: document) -> None:
    """Write aliases of other projects' names out, so that they can be linked."""
    for node in doctree.findall(pending_xref):
        target = node.get("reftarget")
        node["reftarget"] = ALIASES.get(target, target)


def _anchor_public(app: Sphinx, doctree: document) -> None:
    """Let links from the source lead to names that are documented under their file."""
    for node in doctree.findall(desc_signature):
        module = node.get("module") or ""
        public = ".".join(module.split(".")[:2])
        if module not in PUBLIC and public in PUBLIC:
            node["ids"].append(f"{public}.{node['fullname']}")


def _resolve_public(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: Element
) -> Element | None:
    """Link a name of one of our files to the public name that it is documented under."""
    if node.get("refdomain") != "py":
        return None
    domain = env.get_domain("py")
    parts = node.get("reftarget", "").removeprefix("mixscvi.").split(".")
    for start in range(len(parts)):
        name = ".".join(parts[start:])
        for module in PUBLIC:
            if f"{module}.{name}" in domain.objects:
                return domain.resolve_xref(
                    env, node["refdoc"], app.builder, "obj", f"{module}.{name}", node, text
                )
    return None


def _check_complete(app: Sphinx, env: BuildEnvironment) -> None:
    """Raise if a public name has no entry in the API reference."""
    documented = env.get_domain("py").objects
    missing = [
        f"{module}.{name}"
        for module in PUBLIC
        for name in importlib.import_module(module).__all__
        if not name.startswith("__")
        and f"{module}.{name}" not in documented
        # a module is documented by its names; what two modules offer, under one of them
        and f"{module}.{name}" not in PUBLIC
        and f"mixscvi.{name}" not in documented
    ]
    if missing:
        raise ValueError(f"public names without an entry in docs/api: {', '.join(missing)}")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register."""
    NumpyDocstring._parse_returns_section = _returns_as_prose
    NumpyDocstring._parse_attribute_docstring = _attribute_in_words
    NumpyDocstring.lines = _line_by_line
    # after sphinx-autodoc-typehints
    app.connect("autodoc-process-docstring", _set_fields_apart, priority=900)
    app.connect("autodoc-skip-member", _skip_inherited)
    app.connect("autodoc-process-bases", _without_mixins)
    app.connect("doctree-read", _in_full)
    app.connect("doctree-read", _anchor_public)
    app.connect("missing-reference", _resolve_public)
    app.connect("env-check-consistency", _check_complete)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
