"""Every cache and search of transformers' `generate` on our class, against the stock class."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_hf_equality import Pair
from test_hf_models import BASE, PLACEHOLDER, TEXT, fresh, prompts
from tolerances import assert_close, assert_same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from earlyfusion.hf import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonModel


def tokens(device: torch.device) -> dict[str, Any]:
    return {"input_ids": torch.tensor([[0, 50, 60, 61, 62]], device=device)}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Pair:
    folder = tmp_path_factory.mktemp("caches")
    return Pair(folder, device, swin_norm=True, num_key_value_heads=2, model_parallel_size=2)


def check(pair: Pair, **how: Any) -> None:
    inputs = prompts(pair.own.device) | {"disable_compile": True, "suppress_tokens": [PLACEHOLDER]}
    assert torch.equal(*pair.generated(inputs, do_sample=False, **how))


@pytest.mark.parametrize("name", ["dynamic", "static", "offloaded_static"])
@pytest.mark.filterwarnings("ignore")  # transformers' own, about a cache that cannot be offloaded
def test_caches_by_name(pair: Pair, name: str) -> None:
    if name.startswith("offloaded") and not torch.cuda.is_available():
        pytest.skip("offloading needs a GPU")
    check(pair, cache_implementation=name)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_caches_as_objects(pair: Pair, kind: str, device: torch.device) -> None:
    inputs, results = prompts(device), []
    for model in (pair.stock, pair.own):
        cache: Any = transformers.DynamicCache(config=model.config)
        if kind == "static":
            cache = transformers.StaticCache(config=model.config, max_cache_len=256)
        outputs = model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=6,
            do_sample=False,
            disable_compile=True,
            return_dict_in_generate=True,
        )
        assert outputs.past_key_values is cache
        length = inputs["input_ids"].shape[1] + 5
        assert int(cache.get_seq_length()) == length
        keys = cache.layers[1].keys[:, :, :length]
        results.append((outputs.sequences, keys))
    assert torch.equal(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # optimum-quanto compiles its kernels when it is first used
@pytest.mark.parametrize("bits", [2, 4])
def test_a_quantised_cache(pair: Pair, bits: int, device: torch.device) -> None:
    pytest.importorskip("optimum.quanto")
    settings = {"backend": "quanto", "nbits": bits, "residual_length": 16, "q_group_size": 8}
    check(pair, cache_implementation="quantized", cache_config=settings)
    exact = pair.own.generate(**prompts(device), max_new_tokens=8, do_sample=False)
    rough = pair.own.generate(
        **prompts(device),
        max_new_tokens=8,
        do_sample=False,
        cache_implementation="quantized",
        cache_config=settings,
    )
    assert exact.shape == rough.shape


def test_a_cache_may_be_cut_and_continued(pair: Pair, device: torch.device) -> None:
    model, cache = pair.own, transformers.DynamicCache(config=pair.own.config)
    ids = torch.tensor([[0, 50, 60, 61, 62, 70, 71]], device=device)
    model(ids, past_key_values=cache)
    cache.crop(-3)
    continued = model(ids[:, 4:], past_key_values=cache).logits
    assert_close(continued, model(ids).logits[:, 4:], atol=1e-5, rtol=1e-5)


def test_generating_from_embeddings(pair: Pair, device: torch.device) -> None:
    inputs, results = prompts(device), []
    for model in (pair.stock, pair.own):
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        results.append(
            model.generate(
                inputs_embeds=embedded,
                attention_mask=inputs["attention_mask"],
                pixel_values=inputs["pixel_values"],
                max_new_tokens=6,
                do_sample=False,
            )
        )
    assert torch.equal(*results)
    by_ids = pair.own.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(results[1], by_ids[:, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.filterwarnings("ignore")  # transformers' own, about its configs
def test_assisted_as_in_the_stock_class(
    pair: Pair, tmp_path: Path, sample: bool, device: torch.device
) -> None:
    fresh(torch.device("cpu"), num_hidden_layers=1).save_pretrained(tmp_path)
    stock = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path).eval()
    ours = ChameleonForConditionalGeneration.from_pretrained(tmp_path).eval()
    helpers = (stock.to(device), ours.to(device))
    results = []
    for model, helper in zip((pair.stock, pair.own), helpers, strict=True):
        torch.manual_seed(3)
        how = {"do_sample": sample, "max_new_tokens": 12, "assistant_model": helper}
        results.append(model.generate(**tokens(device), **how))
    assert torch.equal(*results)
    if not sample:
        assert torch.equal(
            results[1], pair.own.generate(**tokens(device), do_sample=False, max_new_tokens=12)
        )


def test_an_assistant_of_another_class(pair: Pair, device: torch.device) -> None:
    torch.manual_seed(1)
    settings = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 16}
    config = transformers.LlamaConfig(**settings, num_hidden_layers=1, num_attention_heads=2)
    llama = transformers.LlamaForCausalLM(config).eval().to(device)
    how = {"do_sample": False, "max_new_tokens": 12}
    expected = pair.own.generate(**tokens(device), **how)
    for helper in (llama, pair.stock):
        actual = pair.own.generate(**tokens(device), **how, assistant_model=helper)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "min_p": 0.05, "num_return_sequences": 3},
        {"do_sample": True, "typical_p": 0.7},
        {"do_sample": True, "epsilon_cutoff": 3e-3},
        {"do_sample": False, "no_repeat_ngram_size": 2, "min_new_tokens": 6},
        {"do_sample": False, "bad_words_ids": [[50], [60, 61]]},
        {"do_sample": False, "guidance_scale": 1.5},
    ],
    ids=lambda how: "-".join(how),
)
def test_other_searches(pair: Pair, how: dict[str, Any], device: torch.device) -> None:
    inputs = {key: value for key, value in prompts(device).items() if key != "pixel_values"}
    inputs["input_ids"] = inputs["input_ids"].clamp(max=PLACEHOLDER - 1)
    assert torch.equal(*pair.generated(inputs, **how))


def test_scores_with_transformers_guidance(pair: Pair, device: torch.device) -> None:
    how = {"guidance_scale": 1.5, "do_sample": False, "max_new_tokens": 5}
    more = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    inputs = prompts(device) | {"negative_prompt_ids": prompts(device)["input_ids"][:, :2]}
    expected, actual = (model.generate(**inputs, **how, **more) for model in (pair.stock, pair.own))
    assert torch.equal(expected.sequences, actual.sequences)
    for name in ("logits", "scores"):
        assert_close(torch.stack(actual[name]), torch.stack(expected[name]), atol=1e-4, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # transformers' own, about the move
@pytest.mark.parametrize(
    ("how", "name"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search"),
        ({"dola_layers": "low"}, "Dola Generation"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "Group Beam Search"),
        ({"num_beams": 2, "force_words_ids": [[5]]}, "Constrained Beam Search"),
    ],
)
def test_a_moved_search_is_where_transformers_has_it(
    pair: Pair, how: dict[str, Any], name: str, device: torch.device
) -> None:
    for model in (pair.stock, pair.own):
        with pytest.raises(ValueError, match=f"{name} requires `trust_remote_code"):
            model.generate(**tokens(device), **how, do_sample=False, max_new_tokens=3)


def test_a_search_of_ones_own(pair: Pair, device: torch.device) -> None:
    def longest(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        for _ in range(3):
            best = model(input_ids, image_logits=False).logits[:, -1:].argmax(-1)
            input_ids = torch.cat((input_ids, best), 1)
        return input_ids

    actual = pair.own.generate(**tokens(device), custom_generate=longest, max_new_tokens=3)
    assert torch.equal(
        actual, pair.own.generate(**tokens(device), do_sample=False, max_new_tokens=3)
    )


def test_resized_embeddings(tmp_path: Path, device: torch.device) -> None:
    for tied in (False, True):
        model = fresh(device, tie_word_embeddings=tied)
        before = model(tokens(device)["input_ids"]).logits
        model.resize_token_embeddings(100, mean_resizing=False)
        after = model(tokens(device)["input_ids"]).logits
        assert_same(after[..., :96], before)
        assert model.config.vocab_size == model.vocab_size == 100
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        model.save_pretrained(tmp_path / str(tied))
        reloaded = ChameleonForConditionalGeneration.from_pretrained(tmp_path / str(tied))
        reloaded.to(device)
        assert_same(reloaded(tokens(device)["input_ids"]).logits, after)


def test_what_a_base_model_gives(pair: Pair, device: torch.device) -> None:
    stock = transformers.ChameleonModel.from_pretrained(pair.folder).eval().to(device)
    model = ChameleonModel.from_pretrained(pair.folder).eval().to(device)
    inputs, more = prompts(device), {"output_hidden_states": True, "use_cache": False}
    expected, actual = stock(**inputs, **more), model(**inputs, **more)
    mask = inputs["attention_mask"].bool()
    assert actual.past_key_values is None
    for a, b in zip(expected.hidden_states, actual.hidden_states, strict=True):
        assert_close(a[mask], b[mask], atol=1e-5, rtol=1e-5)


def test_losses_on_text_are_those_of_the_stock_class(pair: Pair, device: torch.device) -> None:
    """With image tokens in reach, as a row that draws is scored, it would be larger."""
    ids = TEXT[TEXT >= 40][None, :20].to(device)
    expected = pair.stock(ids, labels=ids).loss
    assert_close(pair.own(ids, labels=ids).loss, expected)
    assert_close(pair.own(ids, labels=ids, image_logits=False).loss, expected)
    assert pair.own(ids, labels=ids, image_logits=True).loss > expected


def test_configs_made_by_hand() -> None:
    with torch.device("meta"):
        model = ChameleonModel(ChameleonConfig())
    assert model.config.hidden_size == model.embed_tokens.weight.shape[1] == 4096
    assert ChameleonConfig(**BASE).to_dict()["vocab_size"] == 96


# ---- what a GPU would wait for, shown without one: tensors without values have none to read


class Waits(TorchDispatchMode):
    """Counts the numbers that the host reads out of tensors while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def unreal(pair: Pair) -> Any:
    """The model on the meta device, where reading a value raises."""
    return copy.deepcopy(pair.own).to("meta")


def cache_of(model: Any, kind: str) -> Any:
    if kind == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=64)
    return transformers.DynamicCache(config=model.config)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("image_logits", [False, True])
def test_a_step_never_waits(unreal: Any, kind: str, image_logits: bool) -> None:
    cache, ids = cache_of(unreal, kind), torch.zeros(2, 5, dtype=torch.int64, device="meta")
    for new in (ids, ids[:, :1]):
        logits = unreal(new, past_key_values=cache, image_logits=image_logits).logits
        assert logits.is_meta and logits.shape[:2] == new.shape


@pytest.mark.parametrize("image_logits", [False, None])
def test_a_step_of_training_never_waits(unreal: Any, image_logits: bool | None) -> None:
    ids = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    with torch.inference_mode():  # what is kept from it must serve a backward pass too
        unreal(ids, image_logits=False)
    with torch.enable_grad():
        unreal.train()(ids, labels=ids, image_logits=image_logits).loss.backward()
    assert unreal.lm_head.weight.grad.is_meta


@pytest.mark.parametrize("assigned", [False, True])
def test_a_compiled_step_reads_no_tensor_of_another_device(unreal: Any, assigned: bool) -> None:
    """A CUDA graph cannot: one tensor of the CPU, and none would be made."""
    foreign: list[str] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        tensors = [value for value in [*inputs, *values] if isinstance(value, Tensor)]
        foreign.extend(str(t.device) for t in tensors if not t.is_meta)
        return graph.forward

    cache, ids = cache_of(unreal, "static"), torch.zeros(1, 5, dtype=torch.int64, device="meta")
    # The prompt is read first, as `generate` does; by the layers alone if the model is to be told
    # which ids are images only when its forward is replaced.
    read = unreal.model if assigned else partial(unreal, image_logits=False)
    read(ids, past_key_values=cache)
    torch.compiler.reset()
    compiled = torch.compile(unreal.forward, fullgraph=True, backend=backend)
    if assigned:
        unreal.forward = compiled
        compiled = unreal
    assert compiled(input_ids=ids[:, :1], past_key_values=cache, image_logits=False).logits.is_meta
    assert not foreign


def waits(model: Any, tokens: int, **how: Any) -> int:
    inputs = {"input_ids": torch.tensor([[0, 50, 60, 61, 62]] * 2, device=model.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with Waits() as waiting:
        model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            disable_compile=True,
            cache_implementation="static",
            **how,
        )
    return waiting.count


@pytest.mark.parametrize("sample", [False, True])
def test_generation_synchronizes_as_rarely_as_the_stock_class(pair: Pair, sample: bool) -> None:
    """Per token: what the prompt costs is left out by a difference."""
    stock, ours = (
        waits(model, 9, do_sample=sample) - waits(model, 1, do_sample=sample)
        for model in (pair.stock, pair.own)
    )
    assert ours == stock == 8
