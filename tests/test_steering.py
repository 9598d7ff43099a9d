"""Words, logits processors, log-probabilities, scores: one thing in reference loop and engine."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from time import process_time
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tiny import CONFIG, tiny_processor, tiny_transformer
from torch import Tensor

from earlyfusion import (
    Chameleon,
    ContextError,
    Image,
    ImageDone,
    Message,
    PromptError,
    SamplingParams,
    SettingError,
    TokenDrawn,
    WeightsError,
)
from earlyfusion.generation.reference import generate, generate_tokens
from earlyfusion.generation.request import Event, Request
from earlyfusion.generation.steering import Words
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.model.vqgan import VQGAN

PLAIN = SamplingParams(max_tokens=30, repetition_penalty=1.3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Chameleon:
    processor = tiny_processor(tmp_path_factory.mktemp("tiny"))
    torch.manual_seed(0)
    vqgan = VQGAN(CONFIG.vq_config).eval().to(device)
    tokenizer = ImageTokenizer(vqgan, CONFIG.vq_config.resolution)
    return Chameleon(tiny_transformer(processor, 1.0, device), tokenizer, processor)


def forced(logits: Tensor, low: float, high: float, *tokens: int) -> Tensor:
    """`high` for these tokens, `low` for all others."""
    ids = torch.tensor(tokens, device=logits.device)
    return torch.full_like(logits, low).index_fill(0, ids, high)


def same(ids: list[int], logits: Tensor) -> Tensor:
    return logits


def comparable(events: list[Event]) -> list[Any]:
    """Events as plain values."""
    return [e.codes.tolist() if isinstance(e, ImageDone) else e for e in events]


def engine_and_loop(model: Chameleon, request: Request) -> list[Any]:
    """The events of the engine, which are those of the reference loop."""
    events = comparable(list(model.engine.generate(request)))
    plain = comparable(list(generate(model.transformer, model.processor, request)))
    for engine_event, loop_event in zip(events, plain, strict=True):
        if isinstance(engine_event, TokenDrawn):
            assert engine_event.logprob.id == loop_event.logprob.id
            assert engine_event.logprob.logprob == pytest.approx(
                loop_event.logprob.logprob, abs=1e-4
            )
        else:
            assert engine_event == loop_event
    return events


@pytest.mark.parametrize("output", ["text", "image", "interleaved"])
def test_a_processor_that_changes_nothing_changes_nothing(model: Chameleon, output: Any) -> None:
    for seed in range(3):
        settings = SamplingParams(repetition_penalty=1.3, max_tokens=80, top_k=40)
        plain = model.request("a pear", output, settings, seed)
        steered = model.request("a pear", output, settings, seed, logits_processors=same)
        assert engine_and_loop(model, steered) == comparable(list(model.engine.generate(plain)))


def test_a_processor_sees_all_tokens_and_has_the_last_word_but_for_the_grammar(
    model: Chameleon,
) -> None:
    histories: list[list[int]] = []
    [expected] = model.processor.encode_text("a")
    code = int(model.processor.vocabulary.image_tokens[5])

    def force(ids: list[int], logits: Tensor) -> Tensor:
        histories.append(list(ids))
        ids.clear()  # a copy: what it does to it changes nothing
        assert logits.shape == (CONFIG.vocab_size,) and logits.dtype == torch.float32
        return forced(logits, -1.0, 99.0, expected, code)

    text = model.generate("x", "text", max_tokens=4, temperature=0, logits_processors=[force])
    ids = list(model.request("x", "text").ids)
    assert text.text == "aaaa" and histories == [ids + [expected] * n for n in range(4)]
    histories.clear()
    reply = model.generate("x", "image", image_temperature=0, logits_processors=[same, force])
    [image] = reply.segments
    assert isinstance(image, Image) and image.codes is not None
    assert (image.codes == 5).all(), "a text token cannot come in an image"
    assert len(histories) == 64, "forced tokens are not sampled"


def test_processors_are_called_in_order_on_guided_logits(model: Chameleon) -> None:
    calls: list[str] = []

    def first(ids: list[int], logits: Tensor) -> Tensor:
        calls.append("first")
        return logits * 2

    def second(ids: list[int], logits: Tensor) -> Tensor:
        calls.append("second")
        return logits / 2

    request = model.request(
        ["red ", np.zeros((16, 16, 3), np.uint8)],
        "image",
        seed=3,
        logits_processors=[first, second],
    )
    plain = replace(request, sampling=replace(request.sampling, logits_processors=None))
    assert request.sampling.guidance_text == 3.0
    assert engine_and_loop(model, request) == comparable(list(model.engine.generate(plain)))
    assert calls[:4] == ["first", "second"] * 2


def test_a_processor_that_fails_ends_its_own_request_only(model: Chameleon) -> None:
    def broken(ids: list[int], logits: Tensor) -> Tensor:
        raise KeyError("nothing\nhere")

    def narrow(ids: list[int], logits: Tensor) -> Tensor:
        return logits[:5]

    def empty(ids: list[int], logits: Tensor) -> Tensor:
        return logits.fill_(-torch.inf)

    def reentrant(ids: list[int], logits: Tensor) -> Tensor:
        model.generate("a", "text", max_tokens=1)  # would wait for this very step
        return logits

    neighbour = model.engine.add(model.request("a pear", "text", PLAIN, seed=1))
    cases = [
        (broken, "broken failed with KeyError"),
        (narrow, r"narrow returned \(5,\)"),
        (reentrant, "the model is asked from within its own step"),
    ]
    for processor, sentence in [*cases, (empty, "logits_processors left no possible token")]:
        with pytest.raises(SettingError, match=sentence) as error:
            model.generate("a", "text", max_tokens=3, logits_processors=processor)
        assert "\n" not in str(error.value)
    text = "".join(getattr(event, "text", "") for event in neighbour)
    assert text.strip() == model.generate("a pear", "text", PLAIN, seed=1).text
    assert not model.engine.busy


BAD: list[tuple[dict[str, Any], str]] = [
    ({"logits_processors": 3}, "logits_processors holds a int"),
    ({"logits_processors": [same, "x"]}, "logits_processors holds a str"),
    ({"bad_words": ["a", ""]}, "bad_words='' is not a word"),
    ({"allowed_words": 7}, "allowed_words=7 is not possible"),
    ({"bad_words": "a\ud83c"}, "bad_words='a\\ud83c' holds half a character"),
    ({"allowed_words": ["a", "\udf53"]}, "allowed_words='\\udf53' holds half a character"),
    ({"bad_words": ["x"] * 257}, "bad_words has 257 strings, limit 256"),
    ({"stop": "x" * 1001}, "stop has a string of 1,001 characters, limit 1,000"),
    ({"allowed_words": ["a", "x" * 1001]}, "allowed_words has a string of 1,001 characters"),
    ({"logprobs": -1}, "logprobs=-1 is not possible"),
    ({"logprobs": 101}, "logprobs=101 is not possible"),
    ({"jacobi": 4, "logprobs": 1}, "jacobi=4 samples several codes at once, which logprobs cannot"),
    ({"jacobi": 4, "bad_words": "x"}, "which bad_words cannot follow"),
    ({"prompt_lookup": 4, "logprobs": 0}, "samples several tokens at once, which logprobs cannot"),
]


@pytest.mark.parametrize(("settings", "sentence"), BAD)
def test_impossible_settings(model: Chameleon, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=re.escape(sentence)):
        model.generate("a", **settings)


def test_bad_words_never_come_however_they_are_spelled(model: Chameleon) -> None:
    free = [model.generate("a", "text", PLAIN, seed=seed) for seed in range(4)]
    letters = sorted({reply.text[at : at + 2] for reply in free for at in range(4, 24, 3)})
    bad = [pair for pair in letters if pair.strip() == pair and "�" not in pair]
    assert len(bad) > 8
    changed = 0
    for seed, before in enumerate(free):
        settings = replace(PLAIN, bad_words=bad)
        engine_and_loop(model, model.request("a", "text", settings, seed))
        reply = model.generate("a", "text", settings, seed)
        assert not [word for word in bad if word in reply.text]
        changed += reply.text != before.text
    assert changed == 4
    # A word that is only completed over several tokens, and one byte at a time.
    [a], [b] = model.processor.encode_text("q"), model.processor.encode_text("z")

    def qz(ids: list[int], logits: Tensor) -> Tensor:
        return forced(logits, -50.0, 0.0, a, b)

    text = model.generate(
        "x", "text", seed=0, max_tokens=60, logits_processors=qz, bad_words=["zzqq", "qzqzq"]
    ).text
    assert {*text} == {"q", "z"} and "zzq" in text and "qzqz" in text
    assert "zzqq" not in text and "qzqzq" not in text


def test_allowed_words_are_all_that_text_holds(model: Chameleon) -> None:
    words = ["red", "red apple", "사과", "pear"]
    shape = re.compile(f"({'|'.join(words)})([ \n]({'|'.join(words)}))*")
    texts = []
    for seed in range(8):
        settings = SamplingParams(max_tokens=60, allowed_words=words, temperature=2.0)
        request = model.request("x", "text", settings, seed)
        tokens = list(generate_tokens(model.transformer, model.processor, request))
        reply = model.generate("x", "text", settings, seed)
        if reply.finish_reason == "stop":
            assert shape.fullmatch(reply.text), reply.text
            assert tokens[-1] == model.processor.vocabulary.eos
        texts.append(reply.text)
        engine_and_loop(model, request)
    complete = [text for text in texts if shape.fullmatch(text)]
    assert len(complete) >= 4 and len({*texts}) > 2
    assert {word for text in complete for word in re.split("[ \n]", text)} >= {"red", "pear"}


def test_words_that_can_be_read_in_many_ways_take_no_longer(model: Chameleon) -> None:
    def blocked(words: list[str], text: str) -> list[int]:
        settings = SamplingParams(allowed_words=words)
        request = model.request("x", "text", settings, seed=0)
        ids = [*request.ids, *model.processor.encode_text(text)]
        blocked = Words(model.processor, request).blocked(ids)
        assert blocked is not None
        return list(blocked.tolist())

    # "a a" can be one word or two.
    for text in (" ".join("a" * 60), " ".join("a" * 60) + " "):
        assert blocked(["a", "a a"], text) == blocked(["a"], text)
    assert blocked(["ab", "a"], "a") != blocked(["a"], "a")


@pytest.mark.parametrize("field", ["bad_words", "allowed_words"])
def test_many_words_beside_a_large_vocabulary_take_little_time(
    model: Chameleon, field: Literal["bad_words", "allowed_words"]
) -> None:
    listed = [f"{number * 3:06d}" for number in range(256)]
    request = model.request("x", "text", seed=0, **{field: listed})
    words = Words(model.processor, request)
    words._bytes = {token: f"{token % 999:06d}"[token % 5 :].encode() for token in range(56_000)}
    inside = {token for token, data in words._bytes.items() if data.decode() in listed}
    began = process_time()
    blocked = words.blocked(request.ids)
    assert process_time() - began < 0.5 and blocked is not None and len(inside) > 1000
    assert len(inside & {*blocked.tolist()}) == (len(inside) if field == "bad_words" else 0)


def test_a_word_is_whole_before_an_image(model: Chameleon) -> None:
    for seed in range(12):
        settings = SamplingParams(
            max_tokens=90, allowed_words=["red"], guidance_text=1, guidance_image=1, temperature=1
        )
        reply = model.generate("x", "interleaved", settings, seed)
        texts = [segment.text for segment in reply.segments if not isinstance(segment, Image)]
        assert all(re.fullmatch("red([ \n]red)*", text) for text in texts[:-1])


def logprobs_by_hand(model: Chameleon, ids: list[int], tokens: list[int]) -> list[float]:
    device = model.transformer.lm_head.weight.device
    with torch.no_grad():
        logits = model.transformer(torch.tensor([[*ids, *tokens]], device=device))[0].float()
    table = logits.log_softmax(-1)
    return [float(table[len(ids) - 1 + at, token]) for at, token in enumerate(tokens)]


def test_logprobs_are_those_of_the_model_before_all_settings(model: Chameleon) -> None:
    settings = SamplingParams(
        temperature=0.3, top_k=3, repetition_penalty=2.0, max_tokens=12, bad_words="e", logprobs=3
    )
    request = model.request("a pear", "text", settings, seed=1)
    engine_and_loop(model, request)
    reply = model.generate("a pear", "text", settings, seed=1)
    assert reply.logprobs is not None and len(reply.logprobs) == reply.usage.completion_tokens
    tokens = [entry.id for entry in reply.logprobs]
    expected = logprobs_by_hand(model, list(request.ids), tokens)
    assert [entry.logprob for entry in reply.logprobs] == pytest.approx(expected, abs=1e-4)
    assert model.processor.decode_text(tokens).strip() == reply.text
    for entry in reply.logprobs:
        likely = [other.logprob for other in entry.top]
        assert len(likely) == 3 and likely == sorted(likely, reverse=True)
        assert entry.logprob <= likely[0]
        for other in (entry, *entry.top):
            assert other.text == model.processor.token_text(other.id)
    events = list(model.stream("a pear", "text", settings, seed=1))
    assert [e.logprob for e in events if isinstance(e, TokenDrawn)] == reply.logprobs
    bare = replace(settings, bad_words=None)
    alone = model.generate("a pear", "text", replace(bare, logprobs=0), seed=1)
    assert alone.logprobs is not None and not any(entry.top for entry in alone.logprobs)
    none = model.generate("a pear", "text", replace(bare, logprobs=None), seed=1)
    assert none.logprobs is None and none.text == alone.text
    batch = model.generate_batch(["a pear", "b"], "text", bare, seed=[1, 2])
    assert batch[0].text == none.text and batch[1].logprobs is not None


def test_logprobs_of_a_guided_image_are_the_unguided_models(model: Chameleon) -> None:
    request = model.request("a pear", "image", seed=1, logprobs=0)
    assert request.sampling.guidance_text == 3.0
    engine_and_loop(model, request)
    reply = model.generate("a pear", "image", seed=1, logprobs=0)
    [image] = reply.segments
    assert isinstance(image, Image) and image.codes is not None and reply.logprobs is not None
    spelled = model.processor.layout.spell(image.codes, model.processor.vocabulary)
    expected = logprobs_by_hand(model, list(request.ids), spelled)
    assert [entry.id for entry in reply.logprobs] == spelled[1:-1], "only codes are sampled"
    assert [e.logprob for e in reply.logprobs] == pytest.approx(expected[1:-1], abs=1e-4)


def test_scores_are_log_probabilities_of_the_answers(model: Chameleon) -> None:
    codes = np.arange(64).reshape(8, 8)
    answers: list[Any] = ["a", "a pear, please", ["This: ", Image(codes=codes)], Image(codes=codes)]
    prompt = ["What is this? ", Image(codes=codes[::-1].copy())]
    ids, eos = list(model.request(prompt, "text").ids), model.processor.vocabulary.eos
    for end in (True, False):
        scores = model.score(prompt, answers, end=end)
        for answer, score in zip(answers, scores, strict=True):
            chat = [Message("user", prompt), Message("assistant", answer)]
            tokens = model.processor.encode(chat).ids[len(ids) :] + [eos] * end
            assert score.tokens == tokens
            expected = logprobs_by_hand(model, ids, tokens)
            assert score.token_logprobs == pytest.approx(expected, abs=1e-4)
            assert score.logprob == pytest.approx(sum(expected), abs=1e-3)
            assert score.per_token == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    assert model.score(prompt, answers[::-1])[3].logprob == pytest.approx(
        model.score(prompt, answers)[0].logprob, abs=1e-4
    )


def test_probabilities_of_all_one_token_answers_sum_to_one(model: Chameleon) -> None:
    """Each text token by itself and the rest of the vocabulary."""
    vocabulary, processor = model.processor.vocabulary, model.processor
    texts = [processor.token_text(int(token)) for token in vocabulary.text_tokens]
    single = [text for text in texts if len(processor.encode_text(text)) == 1 and "�" not in text]
    assert len(single) > 100
    scores = model.score("x", single, end=False)
    ids = list(model.request("x", "text").ids)
    device = model.transformer.lm_head.weight.device
    with torch.no_grad():
        logits = model.transformer(torch.tensor([ids], device=device))[0, -1]
    probabilities = logits.float().softmax(-1)
    tokens = [score.tokens[0] for score in scores]
    assert sum(math.exp(score.logprob) for score in scores) == pytest.approx(
        float(probabilities[tokens].sum()), abs=1e-4
    )


def test_a_reply_has_the_score_of_its_logprobs(model: Chameleon) -> None:
    ids = list(model.request("a pear", "text").ids)
    tokens = [*model.processor.encode_text("This is a pear."), model.processor.vocabulary.eos]

    def dictate(history: list[int], logits: Tensor) -> Tensor:
        return forced(logits, -9.0, 9.0, tokens[len(history) - len(ids)])

    reply = model.generate("a pear", "text", temperature=0, logprobs=0, logits_processors=dictate)
    [score] = model.score("a pear", ["This is a pear."])
    assert reply.text == "This is a pear." and reply.logprobs is not None
    assert score.tokens == tokens == [entry.id for entry in reply.logprobs]
    logprobs = [entry.logprob for entry in reply.logprobs]
    assert score.token_logprobs == pytest.approx(logprobs, abs=1e-4)


def test_scores_go_on_with_a_begun_answer(model: Chameleon) -> None:
    [complete] = model.score("x", [["a ", "pear"]])
    chat = [Message("user", "x"), Message("assistant", "a ")]
    [rest] = model.score(chat, ["pear"])
    begun = len(model.processor.encode_text("a "))
    assert rest.tokens == complete.tokens[begun:]
    assert rest.token_logprobs == pytest.approx(complete.token_logprobs[begun:], abs=1e-4)


def test_mistakes_in_scores(model: Chameleon) -> None:
    assert model.score("x", []) == []
    with pytest.raises(PromptError, match="answers is a str: give a list"):
        model.score("x", "yes")
    with pytest.raises(PromptError, match="an answer to be scored is empty"):
        model.score("x", ["yes", ""])
    with pytest.raises(ContextError, match="tokens, limit 256: shorten one of them"):
        model.score("x", ["yes", "q" * 300])


def test_hooks_and_damaged_weights_are_seen_while_steering(model: Chameleon) -> None:
    request = model.request("a pear", "interleaved", PLAIN, seed=2, logits_processors=same)
    before = engine_and_loop(model, request)
    layer = model.transformer.model.layers[0]
    hook = layer.register_forward_hook(lambda module, inputs, out: out * 0.2)
    try:
        assert engine_and_loop(model, request) != before
    finally:
        hook.remove()
    weight = model.transformer.model.norm.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    with pytest.raises(WeightsError, match="not finite"):
        list(model.engine.generate(request))
    with torch.no_grad():
        weight.copy_(kept)
    assert engine_and_loop(model, request) == before


@pytest.mark.parametrize("prompt", [True, False])
def test_texts_too_long_to_be_scored_are_not_encoded(model: Chameleon, prompt: bool) -> None:
    long = "word " * 2_000_000  # encoding it takes half a minute
    # Only of a text that was not encoded is the number of tokens a lower bound.
    with pytest.raises(ContextError, match=r"has at least [\d,]+ tokens, limit 256: shorten"):
        model.score(long if prompt else "x", ["yes" if prompt else long])


def test_words_that_exclude_each_other_say_what_to_change(model: Chameleon) -> None:
    with pytest.raises(SettingError, match=r"allowed_words left no .*: allow other"):
        model.generate("x", "text", allowed_words=["pear"], bad_words=["pear"], seed=0)
