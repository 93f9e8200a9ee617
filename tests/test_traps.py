"""Traps of FIELD.md that have no other place; the others are in the tests of what they are about, each named
for its number."""
import ast, warnings
from pathlib import Path
import pytest, torch
import ddpo_nb
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import PromptSource
from ddpo_nb.trainer import make_config, make_trainer

def calls(tree):
    for n in ast.walk(tree):
        if isinstance(n, ast.Call):
            yield ast.unparse(n.func), {k.arg: ast.unparse(k.value) for k in n.keywords}

@pytest.mark.parametrize("module", sorted(Path(ddpo_nb.__path__[0]).glob("*.py")), ids=lambda o: o.stem)
def test_trap_10_nothing_unpickles(module):
    tree = ast.parse(module.read_text(encoding="utf-8"))
    imported = {
        a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
    } | {str(n.module).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not imported & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"} - (
        {"pickle"} if module.stem == "rewards" else set()
    )
    used = {
        n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "pickle"
    }
    # bytes that a pool's own processes send each other, as multiprocessing does; nothing from disk or
    # network
    assert used <= {"dumps", "loads", "PicklingError"}
    for name, given in calls(tree):
        assert name != "torch.load" or given.get("weights_only") == "True"
        assert not (name.endswith("np.load") and given.get("allow_pickle") == "True")

def full(**kw):
    return make_trainer(
        make_config("ddpo-is", logdir="", sample_num_steps=2, sample_batch_size=2, train_batch_size=2, **kw),
        lambda i, p, m: (i.mean((1, 2, 3)), {}), PromptSource(["cat"]),
        StableDiffusionPolicy(load_pipeline(), use_lora=False)
    )

def test_trap_11_a_loras_learning_rate_for_the_whole_unet_is_warned_of():
    with pytest.warns(UserWarning, match="train_learning_rate: 0.0003 .* whole network"):
        full(train_learning_rate=3e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full(train_learning_rate=1e-5)

def test_trap_11_recipes_for_the_whole_unet_take_small_steps():
    from ddpo_nb.recipes import RECIPES
    assert all(r.config().train_learning_rate <= 1e-5 for r in RECIPES.values() if not r.lora)
    assert any(not r.lora for r in RECIPES.values())
