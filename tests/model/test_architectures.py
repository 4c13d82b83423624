"""Two architectures, one of everything else: names, configurations, folders, caches and shards know which they have."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from rank_processes import spawn
from regpt2.base import shelves
from regpt2.base.errors import CheckpointError, ConfigError, UsageError
from regpt2.base.ranks.world import World
from regpt2.commands.convert import ConvertOptions, convert
from regpt2.config.recipe_files import defaults_for
from regpt2.config.run import RunConfig
from regpt2.config.toml_file import differences, read_toml, to_toml
from regpt2.evals.scoring.context import EvalContext
from regpt2.evals.scoring.endings import Question, score_endings
from regpt2.model.architecture import SHELF, build_model, config_class, switches_on
from regpt2.model.conversion import largest_difference
from regpt2.model.files.contract import TokenizerRef, Vocabulary
from regpt2.model.files.fill_model import tensors_of
from regpt2.model.files.load import load_model
from regpt2.model.flops import n_weights
from regpt2.model.gpt import GPTConfig
from regpt2.model.language_model import LanguageModel, has_token_rows
from regpt2.model.modern import ModernConfig
from regpt2.model.weights import native
from regpt2.sampling.generate import generate
from regpt2.sampling.twins.cpu import in_int8, packed_if_faster
from regpt2.training.optimizer import OptimConfig, build_optimizer, load_state_tensors, state_tensors
from regpt2.training.ranks.strategy import ParallelConfig, gather, load_weights, make_trainable, whole, whole_model

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
SHAPE: dict[str, Any] = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257)
CONFIG = ModernConfig(**SHAPE)
SWITCHES = [field.name for field in dataclasses.fields(ModernConfig) if field.name not in GPTConfig.__annotations__]
LATER: dict[str, Any] = {  # off by default
    "document_mask": True,
    "weightless_norms": True,
    "half_rotary": True,
    "value_embeddings": True,
    "unet_skips": True,
    "x0_mixing": True,
    "mlp_only_layer": 2,
    "window": 9,
}
FIRST = [name for name in SWITCHES if name not in (*LATER, "end_of_text")]
ALL_OFF = dataclasses.replace(CONFIG, **{name: type(getattr(CONFIG, name))(0) for name in FIRST})
LONG = dataclasses.replace(CONFIG, n_layer=5, **LATER)
VARIANTS = {"all on": CONFIG, "all off": ALL_OFF, "all of long windows": LONG} | {
    f"no {name}": dataclasses.replace(CONFIG, **{name: getattr(ALL_OFF, name)}) for name in FIRST
}
VARIANTS |= {name: dataclasses.replace(CONFIG, n_layer=3, **{name: on}) for name, on in LATER.items()}
each_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def random_model(config: GPTConfig = CONFIG) -> LanguageModel:
    """No weight at zero or one, as `zero_init` and norms have them, but for the padding."""
    model = build_model(config, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
        for name in filter(has_token_rows, dict(model.named_parameters())):
            model.get_parameter(name)[config.vocab_size :] = 0.0
    return model


def ids(*shape: int) -> Tensor:
    return torch.randint(257, shape, generator=torch.Generator().manual_seed(3))


def exported(folder: Path, model: LanguageModel, tokenizer: TokenizerRef | None = None) -> Path:
    folder.mkdir()
    vocabulary = None if tokenizer is None else Vocabulary(tokenizer.name, tokenizer.fingerprint)
    native.write(model, folder, vocabulary)
    return folder


def test_every_architecture_says_its_own_name() -> None:
    for name in shelves.entries(SHELF):
        config = config_class(name)(**SHAPE)
        assert config.architecture == name
        assert type(build_model(config)) is shelves.load(SHELF, name).Model


@pytest.mark.parametrize("name", ["modren", "", "gpt-2"])
def test_an_unknown_architecture_is_refused_everywhere(name: str, tmp_path: Path, tiny_recipe: Path) -> None:
    expected = rf"architectures: there is no '{name}'.*Available: gpt2, modern"
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'[model]\narchitecture = "{name}"\n')
    with pytest.raises(ConfigError, match=expected):
        read_toml(recipe)
    with pytest.raises(ConfigError, match=expected):
        defaults_for(str(tiny_recipe), [f"--model.architecture={name}"])
    folder = exported(tmp_path / "m", random_model())
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"model": document["model"] | {"architecture": name}}))
    with pytest.raises(UsageError, match=expected):  # no file is damaged: a plugin may be missing
        load_model(folder)


def test_a_near_name_is_suggested_and_a_wrong_class_is_refused(tiny_recipe: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'modern'"):
        defaults_for(str(tiny_recipe), ["--model.architecture", "modren"])
    with pytest.raises(ConfigError, match="architecture = 'modern' must be 'gpt2' here"):
        GPTConfig(architecture="modern")


@each_variant
def test_a_recipe_survives_being_written(config: ModernConfig, tmp_path: Path) -> None:
    before = RunConfig(model=config, batch=dataclasses.replace(RunConfig().batch, seq_len=32))
    (tmp_path / "config.toml").write_text(to_toml(before))
    assert read_toml(tmp_path / "config.toml") == before
    assert type(read_toml(tmp_path / "config.toml").model) is ModernConfig


@pytest.mark.parametrize("option", [["--model.architecture", "modern"], ["--model.architecture=modern"]], ids=str)
def test_an_option_makes_any_recipe_modern_and_shows_its_switches(
    option: list[str], tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*option, "--model.no-rotary", "--model.softcap", "3", "--model.n-layer", "4"]
    found = tyro.cli(RunConfig, default=defaults_for(str(tiny_recipe), options), args=options).model
    assert found == ModernConfig(**SHAPE | {"n_layer": 4}, rotary=False, softcap=3.0, dropout=0.1)  # the recipe's
    with pytest.raises(SystemExit):
        tyro.cli(RunConfig, default=defaults_for(str(tiny_recipe), option), args=["--help"])
    text = capsys.readouterr().out
    assert all(f"--model.{name.replace('_', '-')}" in text.replace("-no-", "-") for name in SWITCHES)


def test_a_switch_of_another_architecture_is_one_message(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tyro.cli(RunConfig, default=defaults_for(str(tiny_recipe), []), args=["--model.no-rotary"])
    assert caught.value.code == 2
    assert "--model.no-rotary" in capsys.readouterr().err
    recipe = tiny_recipe.with_name("r.toml")
    recipe.write_text("[model]\nrotary = true\n")
    with pytest.raises(ConfigError, match=r"unknown key 'model.rotary'"):
        read_toml(recipe)


def test_an_option_makes_a_modern_recipe_a_gpt2(tmp_path: Path) -> None:
    modern = RunConfig(model=CONFIG, batch=dataclasses.replace(RunConfig().batch, seq_len=32))
    (tmp_path / "my.toml").write_text(to_toml(modern))
    found = defaults_for(str(tmp_path / "my.toml"), ["--model.architecture", "gpt2"])
    assert found.model == GPTConfig(**SHAPE)
    changed = differences(modern, found)
    assert changed["model.architecture"] == ("modern", "gpt2")
    assert changed["model.rotary"] == (True, None)


@each_variant
def test_weights_are_counted_by_formula(config: ModernConfig) -> None:
    padded = dataclasses.replace(config, vocab_multiple=64)
    assert n_weights(padded) == sum(p.numel() for p in build_model(padded).parameters())
    assert sum(tensor.numel() for tensor in tensors_of(build_model(padded)).values()) == build_model(padded).n_params()


@each_variant
def test_a_folder_and_a_file_hold_the_same_model(config: ModernConfig, tmp_path: Path) -> None:
    model = random_model(config)
    folder = exported(tmp_path / "native", model)
    assert convert(ConvertOptions(src=str(folder), dst=tmp_path / "m.safetensors", to="safetensors")) == 0
    assert convert(ConvertOptions(src=str(tmp_path / "m.safetensors"), dst=tmp_path / "again", to="native")) == 0
    loaded = load_model(tmp_path / "again").model
    assert loaded.config == config
    assert largest_difference(model, loaded) == 0
    assert (folder / "config.json").read_bytes() == (tmp_path / "again" / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["gguf", "huggingface", "llmc", "nanogpt"])
def test_formats_of_gpt2_refuse_what_they_have_no_words_for(name: str, tmp_path: Path) -> None:
    folder = exported(tmp_path / "native", random_model())
    with pytest.raises(UsageError, match=r"holds GPT-2 alone.*no biases, rotary, qk_norm.*native.*safetensors"):
        convert(ConvertOptions(src=str(folder), dst=tmp_path / "deep" / "out", to=name))
    folder = exported(tmp_path / "long", random_model(LONG))
    with pytest.raises(UsageError, match=r"value_embeddings, unet_skips, x0_mixing, mlp_only_layer, window; formats"):
        convert(ConvertOptions(src=str(folder), dst=tmp_path / "deep" / "out", to=name))
    assert {path.name for path in tmp_path.iterdir()} == {"native", "long"}


def test_a_folder_from_before_there_were_two_is_a_gpt2(tmp_path: Path) -> None:
    model = random_model(GPTConfig(**SHAPE))
    folder = exported(tmp_path / "old", model)
    document = json.loads((folder / "config.json").read_text())
    del document["model"]["architecture"]
    (folder / "config.json").write_text(json.dumps(document))
    assert largest_difference(model, load_model(folder).model) == 0


def test_a_folder_from_before_long_windows_is_the_model_that_it_was(tmp_path: Path) -> None:
    model = random_model()
    folder = exported(tmp_path / "old", model)
    document = json.loads((folder / "config.json").read_text())
    document["model"] = {key: value for key, value in document["model"].items() if key not in LATER}
    (folder / "config.json").write_text(json.dumps(document))
    loaded = load_model(folder).model
    assert loaded.config == CONFIG
    assert largest_difference(model, loaded) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rotary": 1}, "model.rotary = 1 must be of type bool"),
        ({"softcap": True}, "model.softcap = True must be of type float"),
        ({"softcap": -1}, "model.softcap = -1 must be 0"),
        ({"untied_head": False}, "tensor lm_head.weight .* belongs to no GPT of this shape"),
        ({"rotary": False}, "tensor wpe.weight is missing"),
        ({"rms_norms": False}, "model.rms_norms is not a setting of a GPT; did you mean 'rms_norm'"),
        ({"architecture": ["modern"]}, "Available: gpt2, modern"),
        ({"architecture": "gpt2"}, "is not a setting of a GPT"),
    ],
    ids=str,
)
def test_a_wrong_configuration_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = exported(tmp_path / "m", random_model())
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"model": document["model"] | values}))
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_a_long_context_needs_no_large_tensor(tmp_path: Path) -> None:
    """Rotary positions are computed: block_size may be larger than any tensor."""
    config = dataclasses.replace(CONFIG, block_size=100_000)
    assert load_model(exported(tmp_path / "m", random_model(config))).model.config == config


@each_variant
def test_generation_with_a_cache_is_generation_without(config: ModernConfig) -> None:
    model = random_model(config).double()
    prompt = ids(3, 5)
    with_cache, without = (generate(model, prompt, 20, temperature=0, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("config", [CONFIG, ALL_OFF], ids=["all on", "all off"])
def test_twins_of_gpt2_are_not_made_of_another_model(config: ModernConfig) -> None:
    model = random_model(config)
    with pytest.raises(UsageError, match="int8 is for plain GPT-2, this ModernGPT"):
        in_int8(model)
    rounded = model.bfloat16()
    assert packed_if_faster(rounded, 1000, rows=1) is rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_endings_are_scored_as_the_whole_text_is(dtype: torch.dtype) -> None:
    """Through a shared cache and a copy in the compute type, against the plain logits of each text."""
    model = random_model()
    trainable = make_trainable(model, dtype, ALONE, compiled=False)
    questions = [Question(ids(n).tolist(), (ids(4).tolist(), ids(7).tolist())) for n in (3, 9)]
    context = EvalContext(model=trainable, world=ALONE, data=None, seq_len=32, batch=2, val_tokens=1)
    found = score_endings(context, "test", questions)
    for i, question in enumerate(questions):
        for j, ending in enumerate(question.endings):
            text = torch.tensor([[*question.context, *ending]])
            with torch.no_grad():
                log_p = model(text[:, :-1])[0].log_softmax(-1)
            nats = -log_p.gather(1, text[0, 1:, None])[-len(ending) :].sum()
            # bf16 has 8 bits: a nat is off by about 1/256 of itself for each of some steps
            assert float(found.nats[i, j]) == pytest.approx(float(nats), rel=1e-5 if dtype == torch.float32 else 0.03)
    if dtype == torch.bfloat16:
        copied = context.scoring_gpt()
        assert copied.get_parameter("wte.weight") is model.get_parameter("wte.weight")
        assert copied.get_parameter("lm_head.weight").dtype == dtype
        assert model.get_parameter("lm_head.weight").dtype == torch.float32


STRATEGIES: tuple[Any, ...] = ("ddp", "fsdp")
NARROW = 5  # a window
RATES = OptimConfig(lr=1e-3, eps=1e-4, scalar_lr=0.02, value_embedding_lr=0.05)  # eps: no sign of a gradient near zero


def rank_main(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    world = World(rank=rank, local_rank=rank, size=2, device=torch.device("cpu"))
    mine = ids(4, 32)[2 * rank : 2 * rank + 2]
    for strategy, config in ((strategy, config) for strategy in STRATEGIES for config in (CONFIG, LONG)):
        model = build_model(config, seed=9)  # other weights than those that are loaded
        model.set_window(NARROW)
        trainable = make_trainable(model, torch.float32, world, ParallelConfig(strategy=strategy), compiled=False)
        load_weights(model, tensors_of(random_model(config)))
        optimizer = build_optimizer(model, RATES)
        trainable(mine, mine.roll(-1, 1)).backward()
        gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            logits = whole_model(model, world)(ids(2, 32))
        optimizer.step()
        saved = gather(state_tensors(optimizer, model), world)
        if strategy == "fsdp":  # every rank is given whole tensors, and takes its own part
            whole_state = [saved if rank == 0 else {}]
            dist.broadcast_object_list(whole_state)
            optimizer = build_optimizer(model, RATES)
            load_state_tensors(optimizer, model, whole_state[0])
        optimizer.step()  # the same gradient again
        weights = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
        torch.save((gradients, logits, weights), f"{out}/{strategy}_{config.n_layer}_{rank}.pt")
    torch.save(types_that_a_block_is_given(world, mine), f"{out}/types_{rank}.pt")
    os._exit(0)  # torch's own end of a group may wait forever, or abort


def types_that_a_block_is_given(world: World, x: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of the stream and of the rotation, in bf16 and in shards."""
    model = build_model(LONG, seed=9)
    trainable = make_trainable(model, torch.bfloat16, world, ParallelConfig(strategy="fsdp"), compiled=False)
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    model.h[1].register_forward_pre_hook(lambda _, args: seen.append((args[0].dtype, args[2][0].dtype)))
    trainable(x, x.roll(-1, 1)).backward()
    return seen[0]


def test_two_ranks_are_one(tmp_path: Path, unused_port: int) -> None:
    """With scalars too, which are cut: two numbers over two ranks, one number to one of them alone."""
    spawn(rank_main, args=(unused_port, str(tmp_path)), nprocs=2)
    for config in (CONFIG, LONG):
        model, x = random_model(config), ids(4, 32)
        model.set_window(NARROW)
        model(x, x.roll(-1, 1)).backward()
        expected = model(ids(2, 32)).detach()
        optimizer = build_optimizer(model, RATES)
        optimizer.step(), optimizer.step()
        for strategy, rank in ((strategy, rank) for strategy in STRATEGIES for rank in range(2)):
            file = tmp_path / f"{strategy}_{config.n_layer}_{rank}.pt"
            gradients, logits, weights = torch.load(file, weights_only=True)
            assert gradients.keys() == dict(model.named_parameters()).keys()
            for name, p in model.named_parameters():
                assert p.grad is not None
                torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6)  # sums in another order
                torch.testing.assert_close(weights[name], p.detach(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(logits, expected)
    for rank in range(2):
        types = torch.load(tmp_path / f"types_{rank}.pt", weights_only=True)
        assert types == (torch.bfloat16, torch.float32), "positions would be rounded to 8 bits"


def test_switches_that_are_on_are_named() -> None:
    assert switches_on(GPTConfig()) == []
    assert switches_on(ALL_OFF) == []
    assert switches_on(CONFIG) == FIRST
    assert set(switches_on(dataclasses.replace(LONG, mlp_only_layer=0))) == {*FIRST, *LATER}
    assert switches_on(dataclasses.replace(CONFIG, end_of_text=5)) == FIRST, "an id is no switch"
