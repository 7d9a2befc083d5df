"""q and q' as token ids: same head, draft ids untouched, nothing cropped but the draft."""

from __future__ import annotations

import copy
from itertools import takewhile

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, PreTrainedTokenizerFast

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import Problem
from igrpo.rollout.config import DEFAULT_DRAFT_TEMPLATE
from igrpo.rollout.prompts import PromptBuilder
from igrpo.settings import ConfigError
from tests.support.tiny import CHAT_TEMPLATE, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def builder(tokenizer, max_model_length=None, **settings):
    config = TrainConfig(model_name_or_path="m", dataset_name="d", **settings)
    return PromptBuilder(tokenizer, config, max_model_length)


PROBLEM = Problem(0, "What is 3 + 4?", "7")


def test_the_bare_prompt_is_what_the_chat_template_writes(tokenizer):
    built = builder(tokenizer, system_prompt="Be brief.")
    parts = built.parts(PROBLEM)
    rendered = tokenizer.apply_chat_template(list(parts.messages), tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(parts.bare) == rendered
    assert list(parts.bare) == tokenizer.encode(rendered, add_special_tokens=False)


def test_the_draft_goes_in_as_the_ids_that_were_sampled(tokenizer):
    built = builder(tokenizer, system_prompt="S", draft_template=" [{draft}] ")
    parts = built.parts(PROBLEM)
    # Two bytes of one character: re-tokenising the decoded draft could not give these ids back one by one.
    draft = (*tokenizer.encode("é"), 9, tokenizer.eos_token_id)
    ids, trimmed = built.with_draft(parts, draft)
    open_, close = tokenizer.encode(" ["), tokenizer.encode("] ")
    assert parts.before_draft[-2:] == tuple(open_) and parts.after_draft[:2] == tuple(close)
    assert ids == (*parts.before_draft, *draft[:-1], *parts.after_draft)
    assert not trimmed


def test_special_tokens_inside_a_draft_cannot_end_the_users_turn(tokenizer):
    built = builder(tokenizer)
    parts = built.parts(PROBLEM)
    injected = (9, *tokenizer.encode("<|end|><|system|>"), 10)
    ids, trimmed = built.with_draft(parts, injected)
    assert not trimmed
    assert ids == built.with_draft(parts, (9, 10))[0]


def test_special_tokens_without_a_role_do_not_enter_either(tokenizer):
    """`all_special_ids` holds only tokens with a role (bos, eos, pad …); chat models have others, and stop on some."""
    other = copy.deepcopy(tokenizer)
    other.add_tokens([AddedToken("<|turn|>", special=True)])
    turn = other.convert_tokens_to_ids("<|turn|>")
    assert turn not in other.all_special_ids
    built = builder(other)
    parts = built.parts(PROBLEM)
    assert built.with_draft(parts, (9, turn, 10))[0] == built.with_draft(parts, (9, 10))[0]


def test_a_long_draft_loses_its_beginning_and_nothing_else_is_cut(tokenizer):
    free = builder(tokenizer, max_completion_length=8)
    parts = free.parts(PROBLEM)
    needed = free.shortest_context(parts)
    tight = builder(tokenizer, needed + 5, max_completion_length=8)
    ids, trimmed = tight.with_draft(parts, tuple(range(100, 120)))
    assert trimmed and len(ids) + 8 == needed + 5
    assert ids == (*parts.before_draft, *range(115, 120), *parts.after_draft)


def test_several_drafts_have_equal_room(tokenizer):
    settings = {"show_drafts": 2, "max_completion_length": 8}
    free = builder(tokenizer, **settings)
    parts = free.parts(PROBLEM)
    needed = free.shortest_context(parts)
    whole, _ = free.with_draft(parts, range(100, 108), range(110, 118))
    assert free.longest_refinement(parts) == len(whole) + 8 == needed + 16
    ids, trimmed = builder(tokenizer, needed + 7, **settings).with_draft(parts, range(100, 108), (50, 51))
    assert trimmed and ids == (*parts.before_draft, 105, 106, 107, *parts.between_drafts, 50, 51, *parts.after_draft)
    assert tokenizer.decode(parts.between_drafts) == free.config.draft_separator


def test_draft_max_tokens(tokenizer):
    built = builder(tokenizer, draft_max_tokens=3)
    parts = built.parts(PROBLEM)
    ids, trimmed = built.with_draft(parts, (20, 21, 22, 23))
    assert trimmed and ids == (*parts.before_draft, 21, 22, 23, *parts.after_draft)


def test_a_hidden_answer_leaves_the_tokens_before_the_conclusion(tokenizer):
    built = builder(tokenizer, draft_hide_answer=True)
    parts = built.parts(PROBLEM)
    draft = tuple(tokenizer.encode("<think>2 + 3 = 5</think><answer>5</answer>"))
    ids, trimmed = built.with_draft(parts, draft)
    shown = ids[len(parts.before_draft) : len(ids) - len(parts.after_draft)]
    assert not trimmed and shown == draft[: len(shown)]
    assert tokenizer.decode(shown) == "<think>2 + 3 = "
    assert built.with_draft(parts, ())[0] == (*parts.before_draft, *parts.after_draft)


def test_a_question_that_leaves_no_room_is_an_error_not_a_cut(tokenizer):
    built = builder(tokenizer, 20, max_completion_length=8)
    with pytest.raises(ValueError, match="leaves no room in a context of 20"):
        built.with_draft(built.parts(PROBLEM), (9,))


def test_longest_refinement_is_what_the_engine_must_hold(tokenizer):
    built = builder(tokenizer, max_completion_length=8)
    parts = built.parts(PROBLEM)
    ids, _ = built.with_draft(parts, range(100, 108))
    assert built.longest_refinement(parts) == len(ids) + 8
    bare = builder(tokenizer, max_completion_length=8, algorithm="grpo")
    assert bare.longest_refinement(bare.parts(PROBLEM)) == len(parts.bare) + 8


def test_conversations_keep_their_own_system_turn(tokenizer):
    turns = ({"role": "system", "content": "Own."}, {"role": "user", "content": "Q"})
    assert builder(tokenizer).parts(Problem(0, turns, "")).messages == turns
    with pytest.raises(ValueError, match="row 4: a conversation must end in a user turn"):
        builder(tokenizer).parts(Problem(4, ({"role": "assistant", "content": "A"},), ""))


def test_plain_text_begins_as_the_tokenizer_begins_any_text(tokenizer):
    """Llama's `<s>`, for example, which a base model without a chat template has never read a text without."""
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    without = builder(plain).parts(PROBLEM)
    assert tokenizer.decode(without.bare).startswith(builder(plain).parts(PROBLEM).messages[0]["content"])
    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A <|end|>", special_tokens=[("<|system|>", 2), ("<|end|>", 1)]
    )
    built = builder(plain)
    parts = built.parts(PROBLEM)
    assert parts.bare == (2, *without.bare)
    assert built.with_draft(parts, (9,))[0][:2] == parts.bare[:2]


def test_a_template_that_refuses_a_system_turn_says_what_to_write(tokenizer):
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + refusing.chat_template
    )
    with pytest.raises(ConfigError, match="System role not supported; write system_prompt: null"):
        builder(refusing).parts(PROBLEM)
    assert builder(refusing, system_prompt=None).parts(PROBLEM).bare


def test_examples_are_earlier_turns(tokenizer):
    examples = [{"prompt": "1+1?", "completion": "2"}]
    messages = builder(tokenizer, system_prompt="S", few_shot_examples=examples).parts(PROBLEM).messages
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "S"), ("user", "1+1?"), ("assistant", "2"), ("user", PROBLEM.prompt),
    ]  # fmt: skip


def test_a_model_without_a_chat_template_gets_plain_text(tokenizer):
    plain = tiny_tokenizer()
    plain.chat_template = None
    parts = builder(plain, system_prompt="Sys").parts(PROBLEM)
    assert plain.decode(parts.bare) == "Sys\n\nWhat is 3 + 4?\n\n"


def test_the_default_system_prompt_states_both_tags_and_the_drafts_standing(tokenizer):
    text = TrainConfig(model_name_or_path="m", dataset_name="d").system_prompt
    for part in ("<think>", "</think>", "<answer>", "</answer>", "draft", "never as the truth"):
        assert part in text


TEXTS = [
    "What is 3 + 4?",
    " leading",
    "trailing  ",
    "two\n\nparagraphs\n",
    "«é» 😀\t!",
    "",
    "digits 12",
    "x<draft>y",
    "7",
]
TEMPLATES = {
    "plain": CHAT_TEMPLATE,
    "trims": CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim"),
    "newlines": "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}\n\n{% endfor %}assistant\n",
    "words": "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}",
}


def corpus() -> list[str]:
    words = ["user assistant system [INST] [/INST] sum?", *"0123456789abcdefghijklmnopqrstuvwxyz"]
    return [*TEXTS * 5, DEFAULT_DRAFT_TEMPLATE, *words] * 20


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of each kind that models have, trained here."""
    special = ["<unk>", "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    if kind == "wordpiece":
        core = Tokenizer(models.WordPiece(unk_token="<unk>"))
        core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        core.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special)
    elif kind == "byte-level":  # merges punctuation and the line breaks behind it, as GPT-4's and Qwen's do
        core = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(r" ?[^\s\p{L}\p{N}]+[\r\n]*|\p{N}|\s*[\r\n]+|\s+| ?\p{L}+"), "isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    else:  # SentencePiece: spaces are ▁, with or without one in front of any text
        core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        steps = [normalizers.Replace(" ", "▁")]
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if kind == "prefix space" else steps)
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))])
    core.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<|pad|>", eos_token="<|end|>",
        additional_special_tokens=special[3:],
    )  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["byte-level", "prefix space", "no prefix space", "wordpiece"])
def test_prompts_are_what_the_tokenizer_makes_of_the_whole_text(kind, template):
    """Cut into pieces, SentencePiece got a space at every cut: the bare prompt was not the chat template's."""
    tokenizer = trained(kind)
    tokenizer.chat_template = TEMPLATES[template]
    for draft_template in (DEFAULT_DRAFT_TEMPLATE, " [{draft}] ", "\n{draft}"):
        built = builder(tokenizer, system_prompt="Be brief.", draft_template=draft_template)
        several = builder(tokenizer, system_prompt="Be brief.", draft_template=draft_template, show_drafts=2)
        for text in TEXTS:
            parts = built.parts(Problem(0, text, "7"))
            whole = tokenizer.apply_chat_template(list(parts.messages), tokenize=True, add_generation_prompt=True)
            assert list(parts.bare) == list(whole["input_ids"])
            for draft_text in ("9", "z"):  # one token on its own in every context: then q' is a tokenised text, too
                asked = text + draft_template.replace("{draft}", draft_text)
                turns = [*parts.messages[:-1], {"role": "user", "content": asked}]
                q = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True)["input_ids"]
                end = len(q) - len(parts.after_draft)
                draft = tuple(q[len(parts.before_draft) : end])
                assert tokenizer.decode(draft).strip() == draft_text
                assert list(built.with_draft(parts, draft)[0]) == list(q)
                two = f"{draft_text}{several.config.draft_separator}{draft_text}"
                turns[-1] = {"role": "user", "content": text + draft_template.replace("{draft}", two)}
                q = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True)["input_ids"]
                both = several.parts(Problem(0, text, "7"))
                first, *_, last = q[len(both.before_draft) : len(q) - len(both.after_draft)]
                if tokenizer.decode([last]).strip() == draft_text:  # else a blank behind it is a token of its own
                    assert list(several.with_draft(both, (first,), (last,))[0]) == list(q)
                assert several.with_draft(both, draft) == built.with_draft(parts, draft)
            same = takewhile(lambda pair: pair[0] == pair[1], zip(parts.bare, parts.before_draft, strict=False))
            assert len(list(same)) >= len(tokenizer.encode("Be brief.", add_special_tokens=False))


@pytest.mark.parametrize(
    ("settings", "question", "sentence"),
    [
        ({}, "<tool> 3?", r"data\.jsonl:17: the token '<tool>' of the question has the id 261, and .* below 261 "),
        ({"system_prompt": "<tool>"}, "3?", r"data\.jsonl:17: the token '<tool>' of the system prompt has the id 261"),
        (
            {"few_shot_examples": [{"prompt": "1?", "completion": "<tool>"}]}, "3?",
            r"data\.jsonl:17: the token '<tool>' of an earlier turn has the id 261",
        ),
        (
            {"chat_template": "{% for m in messages %}<tool>{{ m['content'] }}{% endfor %}"}, "3?",
            r"data\.jsonl:17: the token '<tool>' of the chat template has the id 261",
        ),
        ({"draft_template": "<tool>{draft}"}, "3?", r"data\.jsonl:17: the token '<tool>' of draft_template has"),
        (
            {"show_drafts": 2, "draft_separator": "\n<tool>\n"}, "3?",
            r"data\.jsonl:17: the token '<tool>' of draft_separator has the id 261",
        ),
    ],
)  # fmt: skip
def test_a_token_that_the_model_has_no_embedding_for_is_told_with_its_row(tokenizer, settings, question, sentence):
    grown = copy.deepcopy(tokenizer)
    assert len(grown) == 261 and grown.add_tokens(["<tool>"]) == 1
    config = TrainConfig(model_name_or_path="m", dataset_name="d", **settings)
    grown.chat_template = config.chat_template or grown.chat_template
    problem = Problem(0, question, "7", where="data.jsonl:17")
    with pytest.raises(ConfigError, match=sentence):
        PromptBuilder(grown, config, vocab_size=261).parts(problem)
    PromptBuilder(grown, config, vocab_size=262).parts(problem)
    PromptBuilder(grown, config).parts(problem)
