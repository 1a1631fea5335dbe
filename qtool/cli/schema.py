"""`qtool schema`: the JSON Schema of recipes, for editors."""

import json


def schema() -> None:
    """Print the JSON Schema of recipes, with every installed method, for editors that check YAML while you type."""
    from qtool.recipe import schema as build  # here, because the verb bears the same name

    print(json.dumps(build(), indent=1))
