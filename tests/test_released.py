"""The released checkpoints' names: read, written, and what does not fit told by name."""

import dataclasses

import pytest
import torch

from helpers import TINY, TINY_TEXT, complaint, randomised, run_state
from model import PRESETS, PixNerd, PixNerdConfig
from pretrained.released import export_reference, import_reference, reference_names
from runtime.checkpoint import build_model, save_checkpoint
from runtime.files import UserError


def released_weights(golden, name="c2i_square"):
    return {key[2:]: value for key, value in golden(name).items() if key.startswith("w.")}


@pytest.mark.parametrize("name", ["c2i_square", "c2i_wide"])
def test_the_configuration_is_read_off_the_shapes(golden, name):
    """`cfg.*` are the arguments of the released constructor. Catches a field block that is counted as the trunk's."""
    cfg = {key[4:]: value.item() for key, value in golden(name).items() if key.startswith("cfg.")}
    config, _ = import_reference(released_weights(golden, name))
    assert config.num_classes == cfg["num_classes"] and config.patch_size == cfg["patch_size"]
    assert (config.hidden_size, config.num_heads) == (cfg["hidden_size"], cfg["num_groups"])
    assert (config.depth, config.field_depth) == (cfg["num_cond_blocks"], cfg["num_blocks"] - cfg["num_cond_blocks"])
    assert (config.field_width, config.field_ratio) == (cfg["hidden_size_x"], cfg["nerf_mlpratio"])
    assert config.resolution == 16 * config.patch_size


def test_export_under_released_names_is_the_inverse_of_import(golden, golden_model):
    model, _ = golden_model("c2i_wide")
    weights, exported = released_weights(golden, "c2i_wide"), export_reference(model)
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", ["Nano", "XL"])
def test_every_weight_has_a_released_name_of_its_own(name):
    with torch.device("meta"):
        model = PixNerd(PRESETS[name])
    names = reference_names(model.config)
    assert names.keys() == model.state_dict().keys() and len(set(names.values())) == len(names)
    config, weights = import_reference(export_reference(model))
    assert config == dataclasses.replace(model.config, resolution=16 * model.config.patch_size)
    assert {key: value.shape for key, value in weights.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


# Of both kinds, a model that the released code could have made, and another value of each numeric setting.
EXPORTED = [
    dataclasses.replace(TINY, resolution=64),
    dataclasses.replace(TINY_TEXT, text_encoder="qwen3", resolution=256, field_ratio=2, num_freqs=32),
]
OTHER = {"num_heads": 4, "patch_size": 16}
NOT_IN_THE_FILE = {"resolution"}  # for `sample.py --resolution` to say; the command line tells the user so
FIELDS = [(config, field) for config in EXPORTED for field in dataclasses.fields(config)]


@pytest.mark.parametrize("config, field", FIELDS, ids=lambda part: getattr(part, "name", type(part).__name__))
def test_a_setting_is_read_back_from_an_exported_file_or_it_is_not_exported(config, field):
    """Every field of both configurations. Catches a file that the released code would read as another model."""
    default = getattr(config, field.name)
    values = field.metadata["choices"] or (["words"] if field.type is str else [OTHER.get(field.name, 2 * default)])
    for value in values:
        other = dataclasses.replace(config, **{field.name: value})
        try:
            read, _ = import_reference(export_reference(build_model(other)))
        except UserError as error:
            assert str(error) == f"the released code knows only {field.name}={field.default!r}, not {value!r}"
            assert value != default and value != field.default
        else:
            assert field.name in NOT_IN_THE_FILE or getattr(read, field.name) == value


def test_export_refuses_in_one_line_what_the_released_code_does_not_know(tmp_path):
    state = run_state(1) | {"config": dataclasses.asdict(dataclasses.replace(TINY, field_norm="none"))}
    state["ema"] = build_model(dataclasses.replace(TINY, field_norm="none")).state_dict()
    save_checkpoint(tmp_path / "run.pt", state)
    export = ("runtime/checkpoint.py", "export", tmp_path / "run.pt", tmp_path / "out.pt", "--reference")
    assert complaint(*export) == "checkpoint.py: the released code knows only field_norm='output', not 'none'"
    assert not (tmp_path / "out.pt").exists()


def test_missing_superfluous_and_foreign_weights_are_named(golden):
    weights = released_weights(golden)
    with pytest.raises(UserError, match="x.ckpt lacks the weight blocks.0.norm1.weight"):
        import_reference({key: value for key, value in weights.items() if key != "blocks.0.norm1.weight"}, "x.ckpt")
    with pytest.raises(UserError, match="x.ckpt has the weight bias, which a "):
        import_reference(weights | {"bias": torch.zeros(1)}, "x.ckpt")
    for foreign in ({}, {"conv1.weight": torch.zeros(1)}, {"s_embedder.proj.weight": "text"}):
        with pytest.raises(UserError, match="^x.ckpt is not a PixNerd checkpoint") as error:
            import_reference(foreign, "x.ckpt")
        assert "\n" not in str(error.value)


def test_numbers_survive_the_way_out_and_back():
    model = randomised(dataclasses.replace(TINY, resolution=64))
    config, weights = import_reference(export_reference(model))
    again = PixNerd(config)
    again.load_state_dict(weights)
    inputs = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 1])
    assert isinstance(config, PixNerdConfig) and torch.equal(again(*inputs), model(*inputs))
