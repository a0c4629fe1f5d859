"""Every input of every node says what it is for."""

import pytest


@pytest.fixture(scope="module")
def our_nodes(server) -> dict:
    return {name: info for name, info in server.get("object_info").json().items() if name.startswith("DMM")}


def inputs_of(info: dict):
    """(name, options) of every input; of a growing one, that of each socket."""
    for kind in ("required", "optional"):
        for name, (_, *options) in info["input"].get(kind, {}).items():
            options = options[0] if options else {}
            template = options.get("template")
            if template:
                yield from inputs_of(template)
            else:
                yield name, options


def test_every_input_has_a_tooltip(our_nodes):
    silent = [
        f"{node}.{name}"
        for node, info in our_nodes.items()
        for name, options in inputs_of(info)
        if not options.get("tooltip")
    ]
    total = sum(1 for info in our_nodes.values() for _ in inputs_of(info))
    print(f"{total} inputs of {len(our_nodes)} nodes, {len(silent)} without tooltip")
    assert silent == []


def test_every_node_says_what_it_does(our_nodes):
    assert [name for name, info in our_nodes.items() if not info["description"].strip()] == []
