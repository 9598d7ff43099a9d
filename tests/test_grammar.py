from __future__ import annotations

import pytest
import torch

from earlyfusion.errors import SettingError
from earlyfusion.generation.grammar import Grammar, Output
from earlyfusion.vocabulary import ImageLayout, Vocabulary, control_and_image_names

CODES, LAYOUT = 12, ImageLayout(2, 3)
NAMES = [*control_and_image_names(CODES), "<reserved08799>", "<", "a", "b", "c", "d"]
VOCABULARY = Vocabulary({name: i for i, name in enumerate(NAMES)})
IMAGE = LAYOUT.num_tokens
TEXT = {VOCABULARY.id_of(name) for name in ("<", "a", "b", "c", "d")}
EOS, BEGIN, END = VOCABULARY.eos, VOCABULARY.begin_image, VOCABULARY.end_image
CODE_IDS = set(VOCABULARY.image_tokens.tolist())


def allowed(grammar: Grammar, state: torch.Tensor) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in grammar.mask(state)]


@pytest.fixture
def grammar(device: torch.device) -> Grammar:
    return Grammar(VOCABULARY, LAYOUT, device=device)


def walk(grammar: Grammar, state: torch.Tensor, seed: int, begin: float = 1.0) -> list[list[int]]:
    """Random replies that obey the mask; `begin` is the weight of begin_image against a token."""
    source = torch.Generator().manual_seed(seed)
    replies: list[list[int]] = [[] for _ in state]
    for _ in range(10_000):
        done = grammar.done(state)
        if done.all():
            return replies
        weights = grammar.mask(state).float().cpu()
        weights[:, BEGIN] *= begin
        token = torch.multinomial(weights, 1, generator=source)[:, 0]
        for reply, t, ended in zip(replies, token.tolist(), done.tolist(), strict=True):
            reply += [] if ended else [t]
        state = grammar.advance(state, token.to(state.device))
    raise AssertionError("a reply never ended")


def count_images(reply: list[int]) -> int:
    """Number of images; every one must be whole, and nothing else be an image token."""
    count, at = 0, 0
    while at < len(reply):
        if reply[at] == BEGIN:
            LAYOUT.parse(reply[at : at + IMAGE], VOCABULARY)
            count, at = count + 1, at + IMAGE
        else:
            assert reply[at] in TEXT or (reply[at] == EOS and at == len(reply) - 1)
            at += 1
    return count


def test_what_may_come_first(grammar: Grammar) -> None:
    outputs: list[Output] = ["text", "image", "interleaved", "interleaved", "interleaved"]
    state = grammar.start(outputs, [3, 1, 1, 1, 0], [50, IMAGE, IMAGE, IMAGE - 1, 50])
    text = TEXT | {EOS}
    assert allowed(grammar, state) == [text, {BEGIN}, text | {BEGIN}, text, text]


def test_an_image_has_its_codes_then_its_end(grammar: Grammar) -> None:
    state = grammar.start(["image"], [1], [99])
    code = VOCABULARY.code_to_token[7]
    for token, may in [(BEGIN, {BEGIN}), *[(code, CODE_IDS)] * 6, (END, {END})]:
        assert not grammar.done(state).item()
        assert allowed(grammar, state) == [may]
        assert grammar.in_image(state).item() == (token != BEGIN)
        state = grammar.advance(state, torch.tensor([token], device=state.device))
    assert grammar.done(state).item() and not grammar.in_image(state).item()
    assert allowed(grammar, state) == [{EOS}]
    eos = torch.tensor([EOS], device=state.device)
    assert torch.equal(grammar.advance(state, eos), state)


@pytest.mark.parametrize("images", [0, 1, 3])
def test_interleaved_replies_are_whole_and_bounded(grammar: Grammar, images: int) -> None:
    counts = set()
    for max_tokens in range(1, 4 * IMAGE):
        rows = 8
        state = grammar.start(["interleaved"] * rows, [images] * rows, [max_tokens] * rows)
        for reply in walk(grammar, state, seed=max_tokens, begin=5.0):
            assert len(reply) <= max_tokens
            assert reply[-1] == EOS or len(reply) == max_tokens
            counts.add(count_images(reply))
    assert counts == set(range(images + 1))


def test_text_replies_have_no_image_and_image_replies_no_text(grammar: Grammar) -> None:
    state = grammar.start(["text", "image", "image"], [9, 1, 3], [40, 40, 2 * IMAGE + 1])
    text, one, two = walk(grammar, state, seed=0)
    assert count_images(text) == 0 and EOS in text
    assert count_images(one) == 1 and len(one) == IMAGE
    assert count_images(two) == 2 and len(two) == 2 * IMAGE, "the third one does not fit"


def test_rows_of_a_batch_walk_as_they_would_alone(grammar: Grammar) -> None:
    outputs: list[Output] = ["interleaved", "text", "image"]
    state = grammar.start(outputs, [2, 0, 1], [30, 5, 8])
    alone = [state[i : i + 1].clone() for i in range(3)]
    source = torch.Generator().manual_seed(2)
    for _ in range(40):
        mask = grammar.mask(state)
        token = torch.multinomial(mask.float().cpu(), 1, generator=source)[:, 0].to(state.device)
        for i in range(3):
            assert torch.equal(grammar.mask(alone[i])[0], mask[i])
            alone[i] = grammar.advance(alone[i], token[i : i + 1])
        state = grammar.advance(state, token)
        assert torch.equal(torch.cat(alone), state)
    assert grammar.done(state).all()


def test_further_stops_may_be_sampled_and_end_the_reply(device: torch.device) -> None:
    turn = VOCABULARY.end_of_turn
    grammar = Grammar(VOCABULARY, LAYOUT, stops=[turn], device=device)
    state = grammar.start(["text"], [0], [9])
    assert allowed(grammar, state) == [TEXT | {EOS, turn}]
    assert grammar.done(grammar.advance(state, torch.tensor([turn], device=device))).item()


def test_begin_image_as_a_stop_ends_where_an_image_would_begin(device: torch.device) -> None:
    grammar = Grammar(VOCABULARY, LAYOUT, stops=[BEGIN], device=device)
    state = grammar.start(["interleaved", "text"], [1, 0], [20, 20])
    assert allowed(grammar, state) == [TEXT | {EOS, BEGIN}, TEXT | {EOS}]
    assert grammar.done(grammar.advance(state, torch.tensor([BEGIN, EOS], device=device))).all()


def test_no_room_is_done_at_once(grammar: Grammar) -> None:
    assert grammar.done(grammar.start(["text", "interleaved"], [0, 1], [0, 0])).all()


@pytest.mark.parametrize(("images", "max_tokens"), [(0, 99), (1, IMAGE - 1)])
def test_an_impossible_image_is_refused(images: int, max_tokens: int) -> None:
    with pytest.raises(SettingError, match=rf"{IMAGE} tokens does not fit"):
        Grammar(VOCABULARY, LAYOUT).start(["image"], [images], [max_tokens])


def test_a_layout_with_size_tokens_and_line_ends_is_obeyed(device: torch.device) -> None:
    layout = ImageLayout(
        2, 3, head=("<racm3:break>", "<reserved08706>"), line_end=("<reserved08799>",)
    )
    grammar = Grammar(VOCABULARY, layout, device=device)
    state = grammar.start(["image"] * 4, [1] * 4, [99] * 4)
    for reply in walk(grammar, state, seed=1):
        assert layout.parse(reply, VOCABULARY).shape == (2, 3)


def test_logits_may_be_wider_than_the_vocabulary(device: torch.device) -> None:
    grammar = Grammar(VOCABULARY, LAYOUT, size=VOCABULARY.size + 13, device=device)
    mask = grammar.mask(grammar.start(["interleaved"], [1], [99]))
    assert mask.shape == (1, VOCABULARY.size + 13)
    assert not mask[:, VOCABULARY.size :].any()
