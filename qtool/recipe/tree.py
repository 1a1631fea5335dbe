"""A recipe's YAML as nodes that know their lines: reading, `extends`, overrides.

Every function reports what is wrong to `problems` and goes on, so that one error names it all.
Why no aliases: an override would change two places at once.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from qtool.errors import nearest

Problem = tuple[yaml.Mark, str]
Problems = list[Problem]
STR, MAP, NULL, INT, FLOAT, TIMESTAMP = (
    f"tag:yaml.org,2002:{name}" for name in ("str", "map", "null", "int", "float", "timestamp")
)
QUOTE = 'put a name pattern in quotes: "*.down_proj"'


def read(path: Path, chain: tuple[Path, ...], problems: Problems) -> MappingNode | None:
    """The node tree of a file, with what it extends merged in; None where there is nothing to go on with.

    `chain` holds the files that extend this one, so that a circle is noticed.
    """
    start = _mark(str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        problems.append((start, "the file does not exist"))
        return None
    except (OSError, UnicodeDecodeError) as error:
        problems.append((start, f"cannot be read as UTF-8 text: {error}"))
        return None
    root = compose(text, str(path), problems)
    index = None if root is None else find(root, "extends")
    if root is None or index is None:
        return root
    key, value = root.value.pop(index)
    if not isinstance(value, ScalarNode) or not value.value:
        problems.append((key.start_mark, "extends must be the name of one other recipe, relative to this file"))
        return root
    chain = (*chain, path.resolve())
    parent_path = path.parent / value.value
    if parent_path.resolve() in chain:
        problems.append((key.start_mark, f"extends {value.value}, which extends this file: a circle"))
        return root
    if not parent_path.is_file():
        problems.append((key.start_mark, f"extends {value.value}, but the file {parent_path} does not exist"))
        return root
    parent = read(parent_path, chain, problems)
    return root if parent is None else _merge(parent, root, problems)


def compose(text: str, name: str, problems: Problems) -> MappingNode | None:
    """Parse a mapping; `name` stands in every mark."""
    root = _compose_any(text, name, problems)
    if isinstance(root, MappingNode):
        return root
    if not problems:
        mark = _mark(name)
        problems.append((mark if root is None else root.start_mark, "a recipe is a mapping with model and pipeline"))
    return None


def _compose_any(text: str, name: str, problems: Problems) -> Node | None:
    """Parse anything. YAML errors, aliases, tags and keys written twice are problems."""
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            mark = _mark(name, event.start_mark.line if event.start_mark else -1)
            if isinstance(event, yaml.AliasEvent):
                problems.append((mark, f"*{event.anchor} is an alias, which is not read; {QUOTE}"))
                return None
            if getattr(event, "tag", None) is not None:
                problems.append((mark, "a tag (!) is not read; write plain YAML"))
                return None
        loader = yaml.SafeLoader(text)
        loader.name = name
        root: Node | None = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        begun = f", begun in line {error.context_mark.line + 1}" if error.context_mark else ""
        context = f" ({error.context}{begun})" if error.context else ""
        hint = f"; {QUOTE}" if "alias" in str(error.context) else ""
        line = error.problem_mark.line if error.problem_mark else -1
        problems.append((_mark(name, line), f"no valid YAML: {error.problem}{context}{hint}"))
        return None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        problems.append((_mark(name, line), f"no valid YAML: it holds the control character {error.character:#x}"))
        return None
    if root is not None:
        problems.extend(_find_faults(root))
    return root


def _mark(name: str, line: int = -1) -> yaml.Mark:
    """A line, counted from 0, of what bears this name; the whole of it where no line is given."""
    return yaml.Mark(name, 0, line, 0, "", 0)


def _find_faults(node: Node) -> Iterator[Problem]:
    if isinstance(node, SequenceNode):
        for item in node.value:
            yield from _find_faults(item)
    if isinstance(node, MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                yield key.start_mark, "a key must be one word"
                continue
            if key.value in lines:
                yield key.start_mark, f'"{key.value}" is written twice, first in line {lines[key.value]}; keep one'
            lines.setdefault(key.value, key.start_mark.line + 1)
            yield from _find_faults(value)


def find(node: MappingNode, key: str) -> int | None:
    """Where a key stands in a mapping."""
    return next((index for index, (name, _) in enumerate(node.value) if name.value == key), None)


def _merge(parent: MappingNode, child: MappingNode, problems: Problems) -> MappingNode:
    """The parent with the child's keys put over it, as qtool.recipe says."""
    for key, value in child.value:
        index = find(parent, key.value)
        old = None if index is None else parent.value[index][1]
        if isinstance(old, SequenceNode) and isinstance(value, SequenceNode):
            _merge_steps(old, value, problems)
        elif isinstance(old, MappingNode) and isinstance(value, MappingNode):
            _put_over(old, value)
        else:
            _put(parent, key, value)
    return parent


def _merge_steps(parent: SequenceNode, child: SequenceNode, problems: Problems) -> None:
    after = len(parent.value)
    for item in child.value:
        key = step_key(item)
        same = [index for index, old in enumerate(parent.value) if key is not None and step_key(old) == key]
        if len(same) > 1:
            problems.append((item.start_mark, f"{key} stands {len(same)} times in what is extended; which is meant?"))
        elif same:
            old, new = parent.value[same[0]].value[0][1], item.value[0][1]
            if isinstance(old, MappingNode) and isinstance(new, MappingNode):
                _put_over(old, new)
            elif not is_null(new):
                parent.value[same[0]] = item
            after = same[0] + 1
        else:
            parent.value.insert(after, item)
            after += 1


def _put_over(old: MappingNode, new: MappingNode) -> None:
    for key, value in new.value:
        _put(old, key, value)


def _put(node: MappingNode, key: ScalarNode, value: Node) -> None:
    index = find(node, key.value)
    if index is None:
        node.value.append((key, value))
    else:
        node.value[index] = (key, value)


def step_key(item: Node) -> str | None:
    """kind/method of a pipeline entry; None where it is not one key with its options."""
    return str(item.value[0][0].value) if isinstance(item, MappingNode) and len(item.value) == 1 else None


def is_null(node: Node) -> bool:
    return node.tag == NULL


def override(root: MappingNode, text: str, problems: Problems) -> None:
    """Carry out one `a.b=value`."""
    name = f"--set {text}"
    mark = _mark(name)
    path, equals, value_text = text.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        problems.append((mark, "must be path=value, such as seed=3 or pipeline.quantize/gptq.damp=0.1"))
        return
    found: Problems = []
    value = _compose_any(value_text, name, found)
    problems += found
    if found:
        return
    null = ScalarNode(NULL, "", mark, mark)
    node: Node = root
    for depth, part in enumerate(parts):
        if isinstance(node, SequenceNode) and depth == 1:
            step = _find_step(node, part)
            if isinstance(step, str):
                problems.append((mark, step))
                return
            pairs, index = step.value, 0
        elif isinstance(node, MappingNode):
            key = ScalarNode(STR, part, mark, mark)
            at = find(node, part)
            if at is None:
                node.value.append((key, null))
            pairs, index = node.value, len(node.value) - 1 if at is None else at
            pairs[index] = (key, pairs[index][1])
        else:
            problems.append((mark, f"{'.'.join(parts[:depth])} is no mapping that could hold {part}; set it whole"))
            return
        key, node = pairs[index]
        if depth == len(parts) - 1:
            pairs[index] = (key, value or null)
        elif is_null(node):
            node = MappingNode(MAP, [], mark, mark)
            pairs[index] = (key, node)
        elif parts[: depth + 1] == ["model"] and isinstance(node, ScalarNode):
            node = MappingNode(MAP, [(ScalarNode(STR, "path", node.start_mark, node.end_mark), node)], mark, mark)
            pairs[index] = (key, node)


def _find_step(pipeline: SequenceNode, part: str) -> MappingNode | str:
    """The entry that `part` (kind/method, or a number from 1) names, or what is wrong."""
    keys = [step_key(item) for item in pipeline.value]
    shown = ", ".join(f"{number}. {key}" for number, key in enumerate(keys, 1))
    same = [index for index, key in enumerate(keys) if key == part]
    if part.isdigit():
        same = [int(part) - 1] if 1 <= int(part) <= len(keys) and keys[int(part) - 1] is not None else []
        if not same:
            return f"the pipeline has no step {part}; it has {shown}"
    if len(same) > 1:
        return f"the pipeline has {part} {len(same)} times; name it by its number: {shown}"
    if not same:
        return f"the pipeline has no step {part}{nearest(part, [key for key in keys if key])}"
    found = pipeline.value[same[0]]
    assert isinstance(found, MappingNode)
    return found


def value_of(node: Node) -> object:
    """Plain values.

    YAML 1.1 reads 2:4 as a number to the base 60 and 2024-01-01 as a date; here they are words, as everyone means them.
    """
    if isinstance(node, MappingNode):
        return {key.value: value_of(value) for key, value in node.value if isinstance(key, ScalarNode)}
    if isinstance(node, SequenceNode):
        return [value_of(item) for item in node.value]
    if node.tag == TIMESTAMP or (node.tag in (INT, FLOAT) and ":" in node.value):
        return node.value
    return yaml.constructor.SafeConstructor().construct_object(node)


def nearest_mark(node: Node, loc: tuple[int | str, ...], at: yaml.Mark) -> yaml.Mark:
    """The mark of the deepest key on the way along `loc`."""
    for part in loc:
        if isinstance(node, MappingNode) and (index := find(node, str(part))) is not None:
            key, node = node.value[index]
            at = key.start_mark
        elif isinstance(node, SequenceNode) and isinstance(part, int):
            node = node.value[part]
            at = node.start_mark
        else:
            break
    return at


def place(mark: yaml.Mark) -> str:
    """FILE:LINE, the file alone, or the override."""
    return mark.name if mark.line < 0 or mark.name.startswith("--") else f"{mark.name}:{mark.line + 1}"
