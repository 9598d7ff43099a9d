"""The transformer, its attention and its cache against Meta's recorded numbers and transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import assert_below, assert_close, assert_same
from torch import Tensor
from transformers.activations import ACT2CLS

from earlyfusion.checkpoints.assemble import build_transformer
from earlyfusion.checkpoints.meta import open_tensors, read_config
from earlyfusion.config import PRESETS, ModelConfig
from earlyfusion.errors import ContextError, SettingError
from earlyfusion.model.attention import CausalAttend, _document_mask, dot_product_attention
from earlyfusion.model.kv_cache import KVCache
from earlyfusion.model.rotary import rotary_frequencies, rotary_tables
from earlyfusion.model.transformer import Transformer

MODELS = ("tiny_1", "tiny_mp2_swin_gqa")
TINY = PRESETS["tiny"]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def read_golden(
    golden: Path, name: str, dtype: torch.dtype, device: torch.device
) -> tuple[Transformer, dict[str, np.ndarray[Any, Any]]]:
    folder = golden / "models" / name
    config = read_config(folder)
    model = build_transformer(config, open_tensors(folder, config), folder, device, dtype)
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    with np.load(golden / "expected" / f"{name}.{kind}.npz") as file:
        return model, dict(file)


def sequences(expected: dict[str, np.ndarray[Any, Any]], device: torch.device) -> list[Tensor]:
    ids = torch.from_numpy(expected["prefill_ids"]).to(device)
    return list(torch.split(ids, expected["prefill_lens"].tolist()))


def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    tokens_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths_B = torch.tensor([[len(row)] for row in rows], device=tokens_BT.device)
    return tokens_BT, torch.arange(tokens_BT.shape[1], device=tokens_BT.device) < lengths_B


def feed(
    model: Transformer, cache: KVCache, slots_B: Tensor, lengths_B: Tensor, rows: list[Tensor]
) -> Tensor:
    """Logits of every valid token, rows concatenated, as the golden files have them."""
    tokens_BT, valid_BT = pad(rows)
    positions_BT = lengths_B[:, None] + torch.arange(tokens_BT.shape[1], device=lengths_B.device)
    attends = cache.attends(slots_B, lengths_B, None if valid_BT.all() else valid_BT)
    return model(tokens_BT, positions_BT, attends)[valid_BT].float()


def assert_near(actual: Tensor, expected: np.ndarray[Any, Any], dtype: torch.dtype) -> None:
    gap = (actual.float() - torch.from_numpy(expected).to(actual.device)).abs()
    if dtype is torch.float32:
        assert_below(gap, 1e-5 * max(1.0, float(np.abs(expected).max())))
    else:
        assert gap.max() < 0.25
        assert gap.mean() < 0.04


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
class TestAgainstMeta:
    def test_prefill_then_steps(
        self, golden: Path, name: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        model, expected = read_golden(golden, name, dtype, device)
        rows = sequences(expected, device)
        cache = KVCache(model.config, len(rows), 32, dtype, device)
        slots = torch.arange(4, device=device)
        lengths = torch.zeros_like(slots)
        assert_near(feed(model, cache, slots, lengths, rows), expected["prefill_logits"], dtype)
        lengths += torch.tensor([len(row) for row in rows], device=device)
        for ids, logits in zip(expected["forced_ids"], expected["step_logits"], strict=True):
            step = feed(
                model, cache, slots, lengths, list(torch.from_numpy(ids).to(device)[:, None])
            )
            assert_near(step, logits, dtype)
            lengths += 1

    def test_two_chunks(
        self, golden: Path, name: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        model, expected = read_golden(golden, name, dtype, device)
        rows = [sequences(expected, device)[i] for i in (0, 1, 3)]
        first = torch.from_numpy(expected["chunk_first_lens"]).to(device)
        cache = KVCache(model.config, 8, 32, dtype, device)
        slots = torch.tensor([5, 0, 2], device=device)  # not neighbours, not in order
        heads = [row[:n] for row, n in zip(rows, first, strict=True)]
        tails = [row[n:] for row, n in zip(rows, first, strict=True)]
        feed(model, cache, slots, torch.zeros_like(slots), heads)
        logits = feed(model, cache, slots, first, tails)
        assert_near(logits, expected["chunk2_logits"], dtype)

    def test_token_by_token(
        self, golden: Path, name: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        model, expected = read_golden(golden, name, dtype, device)
        cache = KVCache(model.config, 1, 13, dtype, device)
        slot = torch.tensor([0], device=device)
        logits = [
            feed(model, cache, slot, slot + i, [token])
            for i, token in enumerate(sequences(expected, device)[1].split(1))
        ]
        assert_near(torch.cat(logits), expected["seq1_token_by_token_logits"], dtype)

    def test_without_a_cache(
        self, golden: Path, name: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        model, expected = read_golden(golden, name, dtype, device)
        tokens_BT, valid_BT = pad(sequences(expected, device))
        assert_near(model(tokens_BT)[valid_BT], expected["prefill_logits"], dtype)


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_cache_are_meta_s(golden: Path, name: str, device: torch.device) -> None:
    model, expected = read_golden(golden, name, torch.float32, device)
    rows = sequences(expected, device)
    _, valid_BT = pad(rows)
    seen: dict[str, Tensor] = {}

    def watch(key: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda _m, _i, out: seen.update({key: out}))

    watch("hidden_embed", model.model.embed_tokens)
    watch("hidden_final_norm", model.model.norm)
    for i, layer in enumerate(model.model.layers):
        watch(f"hidden_layer{i}", layer)
    cache = KVCache(model.config, 4, 32, device=device)
    slots = torch.arange(4, device=device)
    feed(model, cache, slots, torch.zeros_like(slots), rows)

    assert len(seen) == 2 + model.config.num_hidden_layers
    for key, hidden_BTD in seen.items():
        assert_near(hidden_BTD[valid_BT], expected[key], torch.float32)
    # Meta's rotary pairs are neighbours, ours are half a head apart.
    interleaved = cache.k_LSPKH[0, 1, :13].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    assert_near(interleaved, expected["cache_k_layer0_seq1"], torch.float32)
    assert_near(cache.v_LSPKH[0, 1, :13], expected["cache_v_layer0_seq1"], torch.float32)


LONG = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [2.0, 3.0, 4.0, 5.0]}
HF_VARIANTS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "post-norm": {"swin_norm": True},
    "all heads": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    **{name: {"hidden_act": name} for name in ACT2CLS},
    **{
        f"{kind} {number}": {
            "max_position_embeddings": 16,
            "rope_scaling": {"rope_type": kind} | settings,
        }
        for kind, number, settings in (
            ("dynamic", 1, {"factor": 4.0}),
            ("yarn", 1, {"factor": 4.0}),
            ("yarn", 2, {"factor": 8.0, "original_max_position_embeddings": 8, "beta_fast": 4}),
            ("yarn", 3, {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.5, "truncate": False}),
            ("yarn", 4, {"factor": 2.0, "attention_factor": 1.3, "beta_slow": 0.5}),
            ("longrope", 1, LONG | {"original_max_position_embeddings": 8}),
            ("longrope", 2, LONG | {"factor": 3.0}),
            ("longrope", 3, LONG | {"attention_factor": 1.1}),
            ("proportional", 1, {"partial_rotary_factor": 0.5, "factor": 2.0}),
            ("proportional", 2, {}),
        )
    },
}


def peer(config: ModelConfig, device: torch.device) -> Any:
    """transformers' model of the same shape with random weights, norms included."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    images = {"IMGIMG" + "ABCDEFGHIJ"[i] + "Z": 4 + i for i in range(10)}
    settings = config.to_dict() | {"vocabulary_map": images | {"<image>": 20}}
    torch.manual_seed(0)
    model = ChameleonForConditionalGeneration(ChameleonConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if "vqmodel" not in name:
            parameter.normal_(float(name.endswith("norm.weight")), 0.2)
    return model.to(device)


@pytest.mark.parametrize("variant", HF_VARIANTS)
def test_names_and_logits_are_transformers(variant: str, device: torch.device) -> None:
    config = replace(TINY, **HF_VARIANTS[variant])
    reference = peer(config, device)
    state = {k: v for k, v in reference.state_dict().items() if not k.startswith("model.vqmodel.")}
    model = Transformer(config).eval().to(device)
    model.load_state_dict(state, strict=True)
    tokens_BT = torch.randint(21, 512, (2, 40), generator=torch.Generator().manual_seed(1))
    tokens_BT = tokens_BT.to(device)
    expected = reference(input_ids=tokens_BT).logits
    masked = torch.zeros(config.vocab_size, dtype=torch.bool, device=device)
    masked[4:14] = True
    scale = max(1.0, float(expected[..., ~masked].abs().max()))
    gap = (model(tokens_BT) - expected)[..., ~masked].abs()
    assert_below(gap, 1e-5 * scale)
    assert expected[..., ~masked].std() > 0.1


@pytest.mark.parametrize("variant", [name for name in HF_VARIANTS if name[-2:-1] == " "])
def test_rope_follows_transformers_past_the_trained_length_with_a_cache(
    variant: str, device: torch.device
) -> None:
    config = replace(TINY, **HF_VARIANTS[variant])
    reference, model = peer(config, device), Transformer(config).eval().to(device)
    state = {k: v for k, v in reference.state_dict().items() if not k.startswith("model.vqmodel.")}
    model.load_state_dict(state)
    tokens = torch.randint(21, 512, (24,), generator=torch.Generator().manual_seed(1)).to(device)
    cache, kept = KVCache(config, 1, 24, device=device), None
    slot = torch.tensor([0], device=device)
    for start, end in ((0, 6), (6, 7), (7, 20), *((n, n + 1) for n in range(20, 24))):
        out = reference(tokens[None, start:end], past_key_values=kept, use_cache=True)
        kept = out.past_key_values
        positions = torch.arange(start, end, device=device)[None]
        attends = cache.attends(slot, slot + start)
        logits = model(tokens[None, start:end], positions, attends)
        assert_close(logits[0, -1, 21:], out.logits[0, -1, 21:], atol=2e-5, rtol=1e-5)


def test_angles_of_a_row_do_not_depend_on_its_neighbours(device: torch.device) -> None:
    config = replace(TINY, **HF_VARIANTS["dynamic 1"])
    positions_BT = torch.stack((torch.arange(12), torch.arange(20, 32))).to(device)
    both = rotary_tables(config, positions_BT)
    for row in (0, 1):
        alone = rotary_tables(config, positions_BT[row : row + 1])
        assert_same(both.cos[row], alone.cos[0])
    assert not torch.allclose(
        both.cos[1], rotary_tables(replace(config, rope_scaling=None), positions_BT).cos[1]
    )


class TestForward:
    def model(self, device: torch.device, **changes: Any) -> Transformer:
        model = Transformer(replace(TINY, **changes)).eval()
        model.init_weights(torch.Generator().manual_seed(0))
        return model.to(device)

    def tokens(self, device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return torch.randint(0, 512, (2, 24), generator=generator).to(device)

    def test_last_only_is_the_last_row(self, device: torch.device) -> None:
        model, tokens_BT = self.model(device), self.tokens(device)
        assert_close(model(tokens_BT, last_only=True), model(tokens_BT)[:, -1:])

    def test_positions_are_relative(self, device: torch.device) -> None:
        model, tokens_BT = self.model(device), self.tokens(device)
        shifted = model(tokens_BT, torch.arange(24, device=device)[None] + 7)
        assert_close(shifted, model(tokens_BT), atol=1e-5, rtol=0)

    def test_a_later_token_changes_nothing_before_it(self, device: torch.device) -> None:
        model, tokens_BT = self.model(device), self.tokens(device)
        changed = tokens_BT.clone()
        changed[:, 10] += 1
        before, after = model(tokens_BT), model(changed)
        assert_same(before[:, :10], after[:, :10])
        assert not torch.allclose(before[:, 10], after[:, 10])

    def test_tied_head_is_one_parameter(self, device: torch.device) -> None:
        model = self.model(device, tie_word_embeddings=True)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert "lm_head.weight" not in dict(model.named_parameters())

    def test_dropout_acts_in_training_only(self, device: torch.device) -> None:
        model = Transformer(TINY, dropout=0.5).to(device)
        tokens_BT = self.tokens(device)
        assert not torch.equal(model(tokens_BT), model(tokens_BT))
        model.eval()
        assert torch.equal(model(tokens_BT), model(tokens_BT))

    def test_same_generator_same_weights(self, device: torch.device) -> None:
        one, two = self.model(device).state_dict(), self.model(device).state_dict()
        assert all(torch.equal(one[k], two[k]) for k in one)
        assert one["model.layers.0.self_attn.q_norm.weight"].eq(1).all()
        std = float(one["model.layers.0.self_attn.q_proj.weight"].std())
        assert std == pytest.approx(0.02, rel=0.1)

    def test_bf16_autocast_is_near_fp32(self, device: torch.device) -> None:
        model, tokens_BT = self.model(device), self.tokens(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(tokens_BT)
        assert logits.dtype is torch.bfloat16
        expected = model(tokens_BT)
        assert (logits.float() - expected).abs().max() < 0.05 * expected.std() + 2**-7


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rope_scaling": {"rope_type": "axial"}}, "'axial' is unknown: use one of"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "'dynamic' needs factor"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "needs short_factor, long_factor"),
        (
            {"rope_scaling": LONG | {"rope_type": "longrope", "short_factor": [1.0]}},
            "short_factor has 1 entries: longrope needs one for each of the 4 pairs",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 with rope_scaling type 'yarn'",
        ),
        ({"hidden_act": "gelu_old"}, "hidden_act='gelu_old' is unknown: use one of gelu, gelu_10"),
        ({"num_attention_heads": 32}, "odd width 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor=0 .* must be above 0"),
    ],
)
def test_what_cannot_be_built_is_refused_when_a_model_is_built(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SettingError, match=sentence):
        Transformer(replace(TINY, **changes))


def test_dropout_is_checked() -> None:
    with pytest.raises(SettingError, match=r"dropout=1\.0 must be"):
        Transformer(TINY, dropout=1.0)


def test_linear_scaling_stretches_positions(device: torch.device) -> None:
    scaled = replace(TINY, rope_scaling={"rope_type": "linear", "factor": 4.0})
    plain = rotary_frequencies(TINY, device)
    assert_close(rotary_frequencies(scaled, device) * 4, plain)


class TestDocuments:
    @pytest.fixture
    def document_BT(self, device: torch.device) -> Tensor:
        return torch.tensor([[0] * 5 + [1] * 9 + [2] * 2, [3] * 16], device=device)

    def test_each_document_is_as_if_alone(self, document_BT: Tensor, device: torch.device) -> None:
        model = Transformer(replace(TINY, num_key_value_heads=2)).eval()
        model.to(device)
        tokens_BT = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(3))
        tokens_BT = tokens_BT.to(device)
        positions_BT = torch.cat(
            [torch.arange(5), torch.arange(9), torch.arange(2), torch.arange(16)]
        ).view(2, 16)
        positions_BT = positions_BT.to(device)
        attends = [CausalAttend(document_BT)] * model.config.num_hidden_layers
        logits = model(tokens_BT, positions_BT, attends)
        for row, start, end in ((0, 0, 5), (0, 5, 14), (0, 14, 16), (1, 0, 16)):
            alone = model(tokens_BT[row : row + 1, start:end])
            assert_close(logits[row : row + 1, start:end], alone, atol=1e-5, rtol=0)

    def test_documents_equal_the_mask_and_its_gradient(
        self, document_BT: Tensor, device: torch.device
    ) -> None:
        results = []
        for masked in (False, True):
            generator = torch.Generator().manual_seed(4)
            heads = [
                torch.randn(2, 16, n, 8, generator=generator).to(device).requires_grad_()
                for n in (4, 2, 2)
            ]
            with torch.enable_grad():
                if masked:
                    out = dot_product_attention(*heads, mask=_document_mask(document_BT))
                else:
                    out = CausalAttend(document_BT)(*heads)
                out.square().sum().backward()
            results.append([out.detach(), *(x.grad for x in heads)])
        for piece, full in zip(*results, strict=True):
            assert_close(piece, full, atol=1e-5, rtol=1e-5)


class TestKVCache:
    def test_a_full_slot_is_an_error(self, device: torch.device) -> None:
        model = Transformer(TINY).eval().to(device)
        cache = KVCache(TINY, 1, 8, device=device)
        with pytest.raises(ContextError, match="9 tokens do not fit into the context of 8"):
            slot = torch.tensor([0], device=device)
            feed(model, cache, slot, slot + 5, [torch.arange(4, device=device)])

    def test_padding_is_not_stored(self, device: torch.device) -> None:
        model = Transformer(TINY).eval().to(device)
        cache = KVCache(TINY, 2, 4, device=device)
        rows = [torch.arange(n, device=device) for n in (4, 1)]
        slots = torch.arange(2, device=device)
        feed(model, cache, slots, torch.zeros_like(slots), rows)
        assert cache.k_LSPKH[:, 1, :1].abs().sum() > 0
        assert cache.k_LSPKH[:, 1, 1:].abs().sum() == 0

    def test_other_slots_are_left_alone(self, device: torch.device) -> None:
        model = Transformer(TINY).eval().to(device)
        cache = KVCache(TINY, 3, 4, device=device)
        slots, row = torch.tensor([2, 0], device=device), torch.arange(3, device=device)
        feed(model, cache, slots, torch.zeros_like(slots), [row, row])
        assert cache.v_LSPKH[:, 1].abs().sum() == 0
        assert_same(cache.v_LSPKH[:, 0], cache.v_LSPKH[:, 2])
