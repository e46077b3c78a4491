"""YAML whose mistakes can be pointed at: the values, and the line each of them is on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

Location = tuple[int | str, ...]


class YamlProblem(Exception):
    """The text is no YAML that we take; the message says why and ``line`` (from 1) says where."""

    def __init__(self, message: str, line: int | None) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True, slots=True)
class YamlDocument:
    value: Any
    root: yaml.Node | None

    def line_of(self, location: Location) -> int | None:
        """The line (from 1) of the deepest part of ``location`` that the text has."""
        node = self.root
        line = node.start_mark.line + 1 if node is not None else None
        for step in location:
            found = _child(node, step)
            if found is None:
                break
            line, node = found
        return line


def read(text: str) -> YamlDocument:
    """Parse one document.

    Raises:
        YamlProblem: it is not YAML, holds several documents, or repeats a key.
    """
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return YamlDocument(value=None, root=None)
        _refuse_repeated_keys(root)
        return YamlDocument(value=loader.construct_document(root), root=root)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        problem = exc.problem or exc.context or "it cannot be read"
        raise YamlProblem(problem, mark.line + 1 if mark else None) from exc
    except (yaml.YAMLError, ValueError) as exc:
        # ValueError: a scalar that looks like a date or a number and is none.
        raise YamlProblem(str(exc).splitlines()[0], None) from exc
    finally:
        loader.dispose()


def _child(node: yaml.Node | None, step: int | str) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == step:
                return key.start_mark.line + 1, value
    elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        item = node.value[step]
        return item.start_mark.line + 1, item
    return None


def _refuse_repeated_keys(root: yaml.Node) -> None:
    nodes, seen_nodes = [root], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in seen_nodes:  # an alias: the anchor has been looked at
            continue
        seen_nodes.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                nodes.append(value)
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in seen:
                    raise YamlProblem(f"the key {key.value} is repeated", key.start_mark.line + 1)
                seen.add(key.value)
