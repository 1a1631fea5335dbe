"""`qtool validate`: check a recipe without loading a weight."""

from qtool.cli.options import Overrides, RecipeArgument


def validate(recipe: RecipeArgument, overrides: Overrides) -> None:
    """Check a recipe: every problem at once, each with its line. Loads no weight."""
    from qtool.recipe import load

    loaded = load(recipe, overrides)
    steps = " → ".join(step.key for step in loaded.steps)
    print(f"{recipe}: valid\n  model {loaded.model.path}, seed {loaded.seed}\n  {steps}")
    for gate in loaded.gates:
        print(f"  gate {gate.metric}: {', '.join(f'{name} {limit}' for name, limit in gate.stated().items())}")
    print(f"  digest {loaded.digest}")
