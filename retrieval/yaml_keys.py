"""What people write in YAML, they write once: of a key that stands twice YAML itself would take the last one in silence."""

from __future__ import annotations

import yaml


def repeated_key(root: yaml.Node | None) -> str:
    """The first key that a mapping has twice, spelt alike, with its line; "" if none has. `root` of `yaml.compose`."""
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:  # an alias is the same node again
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            keys = set[str]()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    return f"line {key.start_mark.line + 1}: {key.value!r}"
                keys.add(str(key.value))
                waiting += [key, value]
    return ""
