"""Rows that are put together on the device, against the packer that defines them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CONFIG, tiny_processor

from earlyfusion.content import Image, Message, Text
from earlyfusion.data.packing import PackedBatch, Packer, RoleWeights
from earlyfusion.errors import DataError, SettingError
from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.mini.emoji.mixture import MixtureConfig, is_plain, load_samples
from earlyfusion.mini.packed_transformer import BlankLayout, encode_documents
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import ANSWER_TEXT, CONTROL, END, Processor, TokenSequence
from earlyfusion.train.device_rows import CodeNoiseConfig, DeviceRows, templates
from earlyfusion.train.language import LanguageTask

DATA = Path(__file__).parent / "data"
WEIGHTS = RoleWeights(prompt_text=0.2, prompt_image=0.1, answer_text=3.0, end=0.5)
LENGTH, WAYS, PLAIN = 200, 4, 2
GRID, CODES = CONFIG.vq_config.grid, CONFIG.vq_config.grid**2


@pytest.fixture
def processor(tmp_path: Path) -> Processor:
    return tiny_processor(tmp_path)


def messages(number: int) -> list[tuple[str, list[str | int]]]:
    """Turns of texts and numbers of images."""
    kinds: list[list[tuple[str, list[str | int]]]] = [
        [("user", [0, "What?"]), ("assistant", ["a pear"])],
        [("user", ["Draw it."]), ("assistant", [1])],
        [("user", [2, 0, "Same?"]), ("assistant", ["No"])],
        [("user", ["List"]), ("assistant", ["1", 1])],
    ]
    return kinds[number % 4]


def table() -> torch.Tensor:
    """Codes of three images in four ways, all different."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(64, (3, WAYS, CODES), generator=generator).short()


def rows_of(
    processor: Processor,
    config: CodeNoiseConfig,
    count: int = 4,
    plain: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> DeviceRows:
    blank = Processor(processor.tokenizer_file, BlankLayout(GRID, GRID))
    vocabulary = processor.vocabulary

    def stream() -> list[tuple[TokenSequence, list[int], bool]]:
        results = []
        for number in range(count):
            turns, shown = [], []
            for role, parts in messages(number):
                shown += [p for p in parts if isinstance(p, int)]
                empty = Image(codes=np.zeros((1, 1), np.int64))
                turns.append(
                    Message(role, [Text(p) if isinstance(p, str) else empty for p in parts])
                )
            results.append((blank.encode_document(turns), shown, plain))
        return results

    is_code = np.zeros(vocabulary.size, bool)
    is_code[vocabulary.image_tokens] = True
    result = templates(stream(), CODES, is_code, WEIGHTS)
    near = (torch.arange(64)[:, None] + torch.arange(1, 4)) % 64
    tokens = torch.from_numpy(vocabulary.code_to_token)
    return DeviceRows(
        result, table().to(device), PLAIN, tokens, near, 2, LENGTH, vocabulary.pad, config, seed
    )


def by_hand(processor: Processor, rows: DeviceRows, way: int) -> Packer:
    """The packer of `data.packing` on the same documents, all images cut in one way."""
    codes = table()[:, way].view(-1, GRID, GRID).numpy().astype(np.int64)

    def document(number: int) -> TokenSequence:
        turns = [
            Message(role, [Text(p) if isinstance(p, str) else Image(codes=codes[p]) for p in parts])
            for role, parts in messages(rows._template(number))
        ]
        return processor.encode_document(turns)

    return Packer(document, WEIGHTS, 2, LENGTH, processor.vocabulary.pad)


def test_rows_are_those_of_the_packer(processor: Processor, device: torch.device) -> None:
    rows = rows_of(processor, CodeNoiseConfig(), plain=True, device=device)
    rows._plain, rows._codes_PVC = 1, rows._codes_PVC[:, :1]
    packer = by_hand(processor, rows, 0)
    for _ in range(6):  # over more than two epochs
        actual, expected = rows.next(), packer.next()
        for name in PackedBatch._fields:
            assert torch.equal(getattr(actual, name).cpu(), getattr(expected, name)), name
            assert getattr(actual, name).dtype == getattr(expected, name).dtype, name
        assert rows.cursor == packer.cursor
    assert rows.cursor > 2 * 4


def images_in(batch: PackedBatch, processor: Processor) -> list[np.ndarray]:
    """Codes of every image of the inputs, one after another."""
    tokens = batch.tokens_BT.flatten().numpy()
    codes = np.isin(tokens, processor.vocabulary.image_tokens)
    return list(processor.vocabulary.tokens_to_codes(tokens[codes]).reshape(-1, CODES))


def ways_of(found: list[np.ndarray]) -> list[tuple[int, int]]:
    """Which image and way each row of codes is; a mixture of ways is none."""
    known = {tuple(table()[p, v].tolist()): (p, v) for p in range(3) for v in range(WAYS)}
    return [known[tuple(codes.tolist())] for codes in found]


def test_images_come_whole_in_ways_that_they_may_be_cut(processor: Processor) -> None:
    seen: dict[bool, set[tuple[int, int]]] = {}
    for plain in (False, True):
        rows = rows_of(processor, CodeNoiseConfig(), plain=plain)
        results = [x for _ in range(60) for x in ways_of(images_in(rows.next(), processor))]
        seen[plain] = set(results)
    asked = {(p, v) for p in (0, 2) for v in range(WAYS)}
    assert seen[False] == asked | {(1, 0)}  # an image to be drawn stays exact
    assert seen[True] == {(p, v) for p in (0, 2) for v in range(PLAIN)} | {(1, 0)}
    rows = rows_of(processor, CodeNoiseConfig(changed_answers=0.5))
    generated = [
        way
        for _ in range(60)
        for image, way in ways_of(images_in(rows.next(), processor))
        if image == 1
    ]
    assert set(generated) == {0, 1} and 0.3 < np.mean(generated) < 0.7
    rows._plain = 3
    results = [x for _ in range(60) for x in ways_of(images_in(rows.next(), processor))]
    assert {way for image, way in results if image == 1} == {0, 1, 2}


def test_inputs_are_replaced_and_targets_stay_clean(processor: Processor) -> None:
    clean, noisy = (
        rows_of(processor, CodeNoiseConfig()),
        rows_of(processor, CodeNoiseConfig(replace=0.2)),
    )
    vocabulary, shares, near = processor.vocabulary, [], []
    for _ in range(20):
        a, b = clean.next(), noisy.next()
        assert torch.equal(a.targets_BT, b.targets_BT) and torch.equal(a.weight_BT, b.weight_BT)
        is_code = torch.from_numpy(np.isin(a.tokens_BT, vocabulary.image_tokens))
        assert torch.equal(a.tokens_BT[~is_code], b.tokens_BT[~is_code])
        before, after = (vocabulary.tokens_to_codes(x.tokens_BT[is_code]) for x in (a, b))
        shares.append((before != after).mean())
        step = (after - before)[before != after] % 64
        near.append(((step >= 1) & (step <= 3)).mean())
    assert 0.17 < np.mean(shares) < 0.22
    assert 0.45 < np.mean(near) < 0.62  # half are near, and some of the others by chance


@pytest.mark.parametrize(("answers", "prompts"), [(0.0, 0.3), (0.3, 0.0), (0.3, None)])
def test_prompts_may_have_a_share_of_their_own(
    processor: Processor, answers: float, prompts: float | None
) -> None:
    clean = rows_of(processor, CodeNoiseConfig())
    noisy = rows_of(processor, CodeNoiseConfig(replace=answers, replace_prompts=prompts))
    changed: dict[bool, list[bool]] = {True: [], False: []}
    for _ in range(20):
        a, b = clean.next(), noisy.next()
        is_code = torch.from_numpy(np.isin(a.tokens_BT, processor.vocabulary.image_tokens))
        in_prompt = torch.zeros_like(is_code)
        in_prompt[:, 1:] = a.weight_BT[:, :-1] == WEIGHTS.prompt_image
        for where in (True, False):
            codes = is_code & (in_prompt == where)
            changed[where] += (a.tokens_BT != b.tokens_BT)[codes].tolist()
    expected = {True: answers if prompts is None else prompts, False: answers}
    for where, share in expected.items():
        assert np.mean(changed[where]) == pytest.approx(share, abs=0.05)


def test_answers_may_begin_with_codes_of_other_images(processor: Processor) -> None:
    clean = rows_of(processor, CodeNoiseConfig())
    noisy = rows_of(processor, CodeNoiseConfig(swapped_answers=0.5))
    vocabulary, lengths, sources = processor.vocabulary, [], set()
    for _ in range(200):
        a, b = clean.next(), noisy.next()
        assert torch.equal(a.targets_BT, b.targets_BT) and torch.equal(a.weight_BT, b.weight_BT)
        is_code = torch.from_numpy(np.isin(a.tokens_BT, vocabulary.image_tokens))
        in_prompt = torch.zeros_like(is_code)
        in_prompt[:, 1:] = a.weight_BT[:, :-1] == WEIGHTS.prompt_image
        assert torch.equal(a.tokens_BT[~is_code | in_prompt], b.tokens_BT[~is_code | in_prompt])
        answers = is_code & ~in_prompt
        pairs = [vocabulary.tokens_to_codes(x.tokens_BT[answers]) for x in (a, b)]
        for before, after in zip(*(codes.reshape(-1, CODES) for codes in pairs), strict=True):
            # Image 1 is the only one in answers; all codes of the table differ by position.
            same = before == after
            lengths.append(CODES - int(same[::-1].cumprod().sum()))
            first = after[: lengths[-1]]
            found = [n for n in (0, 2) if (table()[n, 0, : len(first)].numpy() == first).all()]
            assert len(first) == 0 or found
            sources.update(found if len(first) > 1 else [])
    assert sources == {0, 2}
    # Two in three swaps take another image than that of the answer.
    assert 0.27 < np.mean(np.array(lengths) > 0) < 0.4
    swapped = [length for length in lengths if length]
    assert min(swapped) < 5 and max(swapped) > CODES - 5
    assert np.mean(swapped) == pytest.approx((CODES + 1) / 2, abs=5)


def test_a_batch_follows_from_the_seed_and_the_cursor(processor: Processor) -> None:
    config = CodeNoiseConfig(replace=0.1, changed_answers=0.5)
    first, other = rows_of(processor, config), rows_of(processor, config, seed=1)
    batches = [first.next() for _ in range(5)]
    second = rows_of(processor, config)
    for _ in range(3):
        second.next()
    third = rows_of(processor, config)
    third.cursor = second.cursor
    assert all(torch.equal(x, y) for x, y in zip(third.next(), batches[3], strict=True))
    assert not torch.equal(other.next().tokens_BT, batches[0].tokens_BT)


def test_a_language_task_learns_from_them(processor: Processor, device: torch.device) -> None:
    torch.manual_seed(0)
    model = Transformer(replace(CONFIG, vocab_size=processor.vocabulary.size))
    model.init_weights()
    model.to(device)
    task = LanguageTask(model, rows_of(processor, CodeNoiseConfig(replace=0.1), device=device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(12):
        loss, _, units = task.loss(step)
        assert units == 2 * LENGTH
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_what_cannot_be_packed_is_refused(processor: Processor) -> None:
    with pytest.raises(DataError, match="0 documents"):
        templates([], CODES, np.zeros(8, bool), WEIGHTS)
    sequence = TokenSequence([0, 5, 2], [CONTROL, ANSWER_TEXT, END])
    with pytest.raises(DataError, match="1 images of 64"):
        templates([(sequence, [0], False)], CODES, np.zeros(8, bool), WEIGHTS)
    with pytest.raises(SettingError, match="replace"):
        CodeNoiseConfig(replace=1.5)
    with pytest.raises(SettingError, match="swapped_answers"):
        CodeNoiseConfig(swapped_answers=2)
    with pytest.raises(SettingError, match="replace_prompts"):
        CodeNoiseConfig(replace_prompts=-0.1)


def test_the_mixture_has_its_shares_and_marks_where_colours_matter() -> None:
    config = MixtureConfig(documents=200, tasks={"caption": 1.0, "colour": 5.0})
    result = load_samples(DATA, config)
    tasks = [s["task"] for s in result]
    assert 195 <= len(result) <= 205
    assert tasks.count("requests") == 40 and tasks.count("bare") == 10
    assert tasks.count("study") == 30 and tasks.count("name") + tasks.count("picture") == 48
    assert result == load_samples(DATA, config)
    several = load_samples(DATA, replace(config, workers=2))
    assert sorted(s["task"] for s in several if s["task"] in ("bare", "study", "requests")) == (
        ["bare"] * 10 + ["requests"] * 40 + ["study"] * 30
    )
    assert all(is_plain(s) for s in result if s["task"] in ("colour", "study"))
    requests = [s for s in result if s["task"] == "requests"]
    images = [s["messages"][-1]["content"][0]["image"] for s in requests]
    data = EmojiData(DATA)
    train = data.split("train")
    firsts = {data.row(i)["codepoints"]: i for i in reversed(train)}.values()
    assert set(images) <= set(firsts) and len(set(images)) == min(len(firsts), 40)
    varied = load_samples(DATA, replace(config, varied=True))
    shown = {s["messages"][-1]["content"][0]["image"] for s in varied if s["task"] == "requests"}
    assert shown - set(firsts) and len(shown) == min(len(train), 40)
    assert len({s["messages"][0]["content"][0]["text"] for s in requests}) > 20
    assert not all(is_plain(s) for s in result)
    chats = load_samples(DATA, replace(config, chats=0.5))
    assert [s["task"] for s in chats].count("chat") == 67  # 0.5 of 1.5
    with pytest.raises(SettingError, match="not all 0"):
        MixtureConfig(dialogues=0, pairs=0, requests=0, studies=0, bare=0)
    text = {"type": "text", "text": "Draw a red apple."}
    assert is_plain({"task": "requests", "messages": [{"role": "user", "content": [text]}]})


def test_documents_hold_their_images_in_order(processor: Processor) -> None:
    result = load_samples(DATA, MixtureConfig(documents=40))
    data = EmojiData(DATA)
    place = {name: number for number, name in enumerate(data.split("train"))}
    blank = Processor(processor.tokenizer_file, BlankLayout(GRID, GRID))
    for sample, (sequence, shown, _) in zip(
        result, encode_documents(result, blank, place), strict=True
    ):
        parts = [p for m in sample["messages"] for p in m["content"]]
        assert shown == [place[p["image"]] for p in parts if p["type"] == "image"]
        assert sum(1 for _, _, kind in sequence.spans if kind == "image") == len(shown)
        assert sequence.ids[0] == processor.vocabulary.bos
        assert sequence.ids[-1] == processor.vocabulary.eos and sequence.role[-1] == END
