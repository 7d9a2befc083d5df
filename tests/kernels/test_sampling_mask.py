"""`sampling_mask`: log-probs, ratio, KL, entropy and gradient over what the sampler kept.

The truth is the reference's ordinary loss in fp64 on logits that are -inf outside of the sets.
"""

import pickle

import pytest
import torch

from igrpo_kernels import (
    GRPOLossConfig,
    SamplingMask,
    grpo_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
    lm_head,
    reference,
    selective_log_softmax,
)
from tests.kernels.oracle import (
    IMPLS,
    LOSS_LEVELS,
    REQUIRED,
    assert_close_to_truth,
    boundary_inputs,
    full_config,
    linear_loss_and_grads,
    loss_and_grad,
    packed,
)


def random_sets(inputs, seed=0):
    """Bool, the shape of logits: each token's own id, and others by chance; of the first row nothing else."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(inputs.completion_ids.shape, generator=generator)[..., None]
    inside = torch.rand(inputs.logits.shape, generator=generator) < share
    inside[0] = False
    return inside.scatter_(-1, inputs.completion_ids[..., None], True)


def mask_of(inside, mask=None):
    """Sets unsorted and with duplicates; empty where masked."""
    rows = [row.nonzero().flatten().tolist()[::-1] for row in inside.reshape(-1, inside.shape[-1])]
    wanted = [True] * len(rows) if mask is None else mask.flatten().tolist()
    return SamplingMask.from_lists([r + r[:1] if m else [] for r, m in zip(rows, wanted, strict=True)])


def truncated(inputs, inside):
    """The same inputs with -inf outside, old and other log-probs around those over the sets."""
    logits = inputs.logits.masked_fill(~inside, -torch.inf)
    index = inputs.completion_ids[..., None]
    shift = (logits.log_softmax(-1) - inputs.logits.log_softmax(-1)).gather(-1, index).squeeze(-1)
    names = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")
    moved = {name: getattr(inputs, name) + shift for name in names}
    return type(inputs)(**{**vars(inputs), **moved}), type(inputs)(**{**vars(inputs), **moved, "logits": logits})


NEEDED = {**REQUIRED, "clip_cov": {"clip_cov_ratio": 1.0}}  # all that qualify: draws hang on last bits
CONFIGS = [
    *(GRPOLossConfig(name, level, max_completion_length=24, **NEEDED.get(name, {})) for name, level in LOSS_LEVELS),
    GRPOLossConfig(kl_tau=0.1, importance_sampling_mode="seq-mask-tis"),
    GRPOLossConfig(rollout_rs="seq_mean_k3", rollout_rs_threshold=0.04, importance_sampling_mode="token_mask"),
    full_config(temperature=0.7, importance_sampling_mode="token_mask"),
    full_config("dapo", "sequence", importance_sampling_mode="sequence_mask"),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.loss_type}-{c.importance_sampling_level}-{c.beta}")
def test_every_loss_is_the_loss_of_logits_that_are_minus_infinity_elsewhere(config, impl):
    inputs = boundary_inputs(level=config.importance_sampling_level)
    inside = random_sets(inputs)
    inputs, cut = truncated(inputs, inside)
    truth, true_grad = loss_and_grad(cut, config)
    dtypes = [torch.float64, torch.float32] if impl == "torch" else [torch.float32]
    for dtype in dtypes:
        close = {"rtol": 1e-11 if dtype == torch.float64 else 5e-5, "atol": 1e-9}
        for some, sets in ((inputs, inside), (packed(inputs), inside[inputs.completion_mask])):
            mask = mask_of(sets, inputs.completion_mask if some is inputs else None)
            out, grad = loss_and_grad(some.to(dtype), config, impl=impl, sampling_mask=mask)
            rows = ... if some is inputs else inputs.completion_mask
            assert_close_to_truth("loss", out.loss, truth.loss, **close)
            assert_close_to_truth("logps", out.per_token_logps, truth.per_token_logps[rows], **close)
            assert_close_to_truth("entropy", out.entropy, truth.entropy[rows], **close)
            assert_close_to_truth("gradient", grad, true_grad[rows], **close)
            assert (grad[~sets] == 0).all()
            sizes = inside[inputs.completion_mask].sum(-1).double()
            assert out.metrics.pop("sampling/kept_tokens/mean").item() == pytest.approx(sizes.mean().item())
            assert out.metrics.keys() == truth.metrics.keys()
            for name, value in truth.metrics.items():
                assert_close_to_truth(name, out.metrics[name], value, **close)
            if some is inputs:  # a set of one token
                assert (out.per_token_logps[0] == 0).all() and (grad[0] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_lot_is_drawn_by_token_ids(impl):
    """Not by the row numbers that the sets' kernels are given in their place."""
    config = GRPOLossConfig("clip_cov", clip_cov_ratio=0.3, clip_cov_lb=-9.0, clip_cov_ub=9.0)
    inputs = boundary_inputs()
    inside = random_sets(inputs)
    inputs, cut = truncated(inputs, inside)
    truth, true_grad = loss_and_grad(cut, config)
    for some, sets in ((inputs, inside), (packed(inputs), inside[inputs.completion_mask])):
        mask = mask_of(sets, inputs.completion_mask if some is inputs else None)
        out, grad = loss_and_grad(some.to(torch.float32), config, impl=impl, sampling_mask=mask)
        rows = ... if some is inputs else inputs.completion_mask
        assert_close_to_truth("loss", out.loss, truth.loss, rtol=1e-4, atol=1e-8)
        assert_close_to_truth("gradient", grad, true_grad[rows], rtol=1e-4, atol=1e-8)


TRANSFORM = {"temperature": 0.7, "logit_scale": 1.3, "final_logit_softcapping": 5.0}


def head_and_sets(impl, inputs):
    """A head, and sets of its own logits, -inf elsewhere after the transform: what the truth computes with."""
    generator = torch.Generator().manual_seed(5)
    vocab = inputs.logits.shape[-1]
    shapes = ((*inputs.completion_ids.shape, 8), (vocab, 8), (vocab,))
    dtype = torch.float64 if impl == "torch" else torch.float32
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def over_sets(head, index, inside):
    """logps and entropy in fp64, by autograd."""
    hidden, weight, bias = (x.double() for x in head)
    x = hidden @ weight.T + bias
    z = 5.0 * torch.tanh(1.3 * x / 5.0) / 0.7
    log_p = z.masked_fill(~inside, -torch.inf).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(~inside, 0.0)).sum(-1)
    return log_p.gather(-1, index[..., None]).squeeze(-1), entropy


@pytest.mark.parametrize("impl", IMPLS)
def test_linear_log_probs_and_entropies_with_every_transform(impl, monkeypatch):
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", {"cpu": 37 * 4 * 50})
    monkeypatch.setattr(reference, "CHUNK_LOGITS", 37 * 50)
    inputs = boundary_inputs()
    head, inside = head_and_sets(impl, inputs), random_sets(inputs)
    index, mask = inputs.completion_ids, inputs.completion_mask
    sets = mask_of(inside, mask)
    leaves = [x.detach().clone().requires_grad_() for x in head]
    truth = [torch.where(mask, x, 0.0) for x in over_sets(leaves, index, inside)]
    (truth[0].sin().sum() + truth[1].cos().sum()).backward()
    made = linear_selective_log_softmax(
        head[0], head[1], index, lm_head_bias=head[2], row_mask=mask, return_entropy=True, sampling_mask=sets,
        impl=impl, **TRANSFORM,
    )  # fmt: skip
    (made[0].sin().sum() + made[1].cos().sum()).backward()
    tolerance = {"rtol": 1e-12 if impl == "torch" else 1e-5, "atol": 1e-12 if impl == "torch" else 1e-6}
    for name, a, b in zip(("logps", "entropy"), made, truth, strict=True):
        assert_close_to_truth(name, a, b, **tolerance)
    for name, a, b in zip(("hidden", "weight", "bias"), head, leaves, strict=True):
        assert_close_to_truth(name, a.grad, b.grad, **tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_linear_loss_is_the_loss_of_its_logits(impl, level, monkeypatch):
    """In chunks that cut sequences, with a frozen bias, and with rows that only report."""
    inputs = boundary_inputs(level=level)
    inputs.advantages[3] = 0.0
    config = full_config("dapo", level, top_entropy_quantile=1.0, beta=0.0, entropy_coef=0.0, **TRANSFORM)
    head, inside = head_and_sets(impl, inputs), random_sets(inputs)
    sets = mask_of(inside, inputs.completion_mask)
    head[2].requires_grad_(False)
    logps, _ = over_sets(head, inputs.completion_ids, inside)
    moved = {n: logps.detach() + getattr(inputs, n) - boundary_inputs(level=level).old_per_token_logps
             for n in ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")}  # fmt: skip
    inputs = type(inputs)(**{**vars(inputs), **moved})
    leaves = [x.detach().double().requires_grad_() for x in head]
    logits = leaves[0] @ leaves[1].T + leaves[2]
    truth = grpo_loss(
        logits, inputs.completion_ids, inputs.advantages, config=config, impl="torch", sampling_mask=sets,
        **inputs.keywords(config),
    )  # fmt: skip
    truth.loss.backward()
    tolerance = {"rtol": 1e-11 if impl == "torch" else 1e-4, "atol": 1e-12 if impl == "torch" else 1e-6}
    for rows in (1000, 10):
        monkeypatch.setattr(lm_head, "CHUNK_BYTES", {"cpu": 37 * 4 * rows})
        monkeypatch.setattr(reference, "CHUNK_LOGITS", 37 * rows)
        some = inputs.to(head[0].dtype)
        out, grads = linear_loss_and_grads(*head, some, config, impl=impl, sampling_mask=sets)
        assert_close_to_truth("loss", out.loss, truth.loss, **tolerance)
        assert_close_to_truth("logps", out.per_token_logps, truth.per_token_logps, **tolerance)
        assert_close_to_truth("entropy", out.entropy, truth.entropy, **tolerance)
        assert_close_to_truth("hidden", grads[0], leaves[0].grad, **tolerance)
        assert_close_to_truth("weight", grads[1], leaves[1].grad, **tolerance)
        assert grads[2] is None and out.metrics.keys() == truth.metrics.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_kernels_take_every_dtype_stride_and_special_value(dtype, inplace):
    """-inf among the kept, NaN and infinities outside of them and in masked rows, logits that are a view."""
    if "cpu" not in IMPLS:
        pytest.skip("impl='cpu' is not built")
    inputs = boundary_inputs()
    inside = random_sets(inputs)
    base = torch.full((8, 25, 40), torch.nan, dtype=dtype)
    base[:, :-1, :37] = inputs.logits.to(dtype).masked_fill(~inside, torch.nan)
    other = inside.clone().scatter_(-1, inputs.completion_ids[..., None], False)
    other[1:] &= torch.rand(other[1:].shape) < 0.2
    base[:, :-1, :37].masked_fill_(other, -torch.inf)
    base[:, -1] = torch.inf
    base[:, :-1][~inputs.completion_mask] = torch.nan
    exact = base[:, :-1, :37].double().masked_fill(~inside, -torch.inf)
    exact = exact.masked_fill(~inputs.completion_mask[..., None], 0.0)
    config = GRPOLossConfig(entropy_coef=0.1, beta=0.1)
    cut = type(inputs)(**{**vars(inputs), "logits": exact})
    truth, true_grad = loss_and_grad(cut, config)
    leaf = base.clone().requires_grad_()
    view = (leaf * 1.0)[:, :-1, :37]
    view.retain_grad()
    out = grpo_loss(
        view, inputs.completion_ids, inputs.advantages.float(), config=config, impl="cpu", inplace=inplace,
        sampling_mask=mask_of(inside), **inputs.to(torch.float32).keywords(config),
    )  # fmt: skip
    (1024 * out.loss).backward()
    rounding = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    assert_close_to_truth("loss", out.loss, truth.loss, rtol=2e-5)
    assert_close_to_truth("logps", out.per_token_logps, truth.per_token_logps, rtol=1e-5, atol=1e-5)
    assert_close_to_truth("gradient", view.grad, 1024 * true_grad, rtol=rounding)
    assert (view.grad[~inside] == 0).all() and view.grad.dtype == dtype


def test_sixteen_bit_heads_and_rounded_or_wide_logits():
    """Within the rounding of a bf16 matmul, which the same call without a mask has, too."""
    inputs = boundary_inputs()
    head, inside = head_and_sets("torch", inputs), random_sets(inputs)
    config = GRPOLossConfig()
    inputs, _ = truncated(inputs, inside)
    truth, grads = linear_loss_and_grads(*head, inputs, config, sampling_mask=mask_of(inside))
    for dtype, wide in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)):
        small = [x.detach().to(dtype).requires_grad_() for x in head]
        some = inputs.to(torch.float32)
        out, made = linear_loss_and_grads(
            *small, some, config, impl=IMPLS[-1], sampling_mask=mask_of(inside), fp32_logits=wide
        )
        assert_close_to_truth("loss", out.loss, truth.loss, rtol=0.2)
        assert all(g.dtype == dtype for g in made)
        for mine, true in zip(made, grads, strict=True):
            assert torch.nn.functional.cosine_similarity(mine.double().flatten(), true.flatten(), 0) > 0.98


def wrong(inside, inputs):
    """(what is passed, words of the answer)"""
    index, lacking = inputs.completion_ids, inside.clone()
    lacking[2, 3] = torch.arange(37) != index[2, 3]
    empty = inside.clone()
    empty[1, 4] = False
    yield mask_of(lacking), r"does not hold the token \d+ at position \(2, 3\): its set has 36 others"
    yield mask_of(empty), r"at position \(1, 4\): its set is empty"
    yield SamplingMask.from_lists([[0]] * 191), "191 rows.*192"
    yield SamplingMask.from_lists([[0, 37]] * 192), r"token id 37, outside of \[0, 37\)"
    yield [[0]] * 192, "must be a SamplingMask, got list"


@pytest.mark.parametrize("impl", IMPLS)
def test_wrong_masks_are_named(impl):
    inputs = boundary_inputs()
    index, inside = inputs.completion_ids, random_sets(inputs)
    head = [x.detach().float() for x in head_and_sets("cpu", inputs)]
    calls = {
        "loss": lambda m: grpo_loss(inputs.logits.float(), index, inputs.advantages, sampling_mask=m, impl=impl),
        "linear": lambda m: linear_grpo_loss(*head[:2], index, inputs.advantages, sampling_mask=m, impl=impl),
        "logps": lambda m: selective_log_softmax(inputs.logits.float(), index, sampling_mask=m, impl=impl),
        "linear logps": lambda m: linear_selective_log_softmax(*head[:2], index, sampling_mask=m, impl=impl),
    }
    for call in calls.values():
        for mask, words in wrong(inside, inputs):
            with pytest.raises(ValueError, match=words):
                call(mask)
    some = packed(inputs)
    sets = inside[inputs.completion_mask]
    sets[30] = torch.arange(37) != some.completion_ids[30]
    with pytest.raises(ValueError, match=r"position 30"):
        loss_and_grad(some.to(torch.float32), GRPOLossConfig(), impl=impl, sampling_mask=mask_of(sets))


def test_a_graph_cannot_hold_a_mask():
    inputs = boundary_inputs()
    mask = mask_of(random_sets(inputs))
    call = torch.compile(lambda x: selective_log_softmax(x, inputs.completion_ids, sampling_mask=mask),
                         backend="eager", fullgraph=True)  # fmt: skip
    with pytest.raises(torch._dynamo.exc.Unsupported, match="sampling_mask does not work"):
        call(inputs.logits)


def test_where_nobody_looks_a_token_outside_its_set_poisons_its_row_alone(monkeypatch):
    """As on a GPU, where looking would be a sync."""
    monkeypatch.setattr("igrpo_kernels.sampling_mask.values_may_be_read", lambda x: False)
    inputs = boundary_inputs()
    inside = random_sets(inputs)
    inside[2, 3] = torch.arange(37) < 5
    index = inputs.completion_ids.clone()
    index[2, 3] = 20
    for impl in IMPLS:
        logits = inputs.logits.float().requires_grad_()
        logps = selective_log_softmax(logits, index, sampling_mask=mask_of(inside), impl=impl)
        logps.sum().backward()
        wrong = torch.zeros(8, 24, dtype=torch.bool)
        wrong[2, 3] = True
        assert torch.equal(logps.isnan(), wrong)
        assert torch.equal(logits.grad.isnan().any(-1), wrong & (impl != "torch"))


def test_masks_are_made_of_what_engines_say():
    lists = [[5, 2, 2], [], [7], [1, 0, 9]]
    mask = SamplingMask.from_lists(lists)
    assert mask.ids.tolist() == [2, 5, 7, 0, 1, 9] and mask.offsets.tolist() == [0, 2, 2, 3, 6] and len(mask) == 4
    ids, offsets = torch.tensor([5, 2, 2, 7, 1, 0, 9], dtype=torch.int32), torch.tensor([0, 3, 3, 4, 7])
    same = [
        SamplingMask(ids, offsets),
        SamplingMask.from_top_k(torch.tensor([[5, 2, 2], [-1, -1, -1], [7, -1, -1], [1, 0, 9]])),
        SamplingMask.from_sequences([lists[:1], [], lists[1:]]),
        SamplingMask.cat([SamplingMask.from_lists(lists[:2]), SamplingMask.from_lists(lists[2:])]),
        SamplingMask.from_lists(lists[::-1]).select(torch.tensor([3, 2, 1, 0])),
        pickle.loads(pickle.dumps(mask)),
        SamplingMask.from_scores(torch.zeros(4, 10).masked_fill(~mask.table(10), -torch.inf)),
    ]
    for other in same:
        assert torch.equal(other.ids, mask.ids) and torch.equal(other.offsets, mask.offsets)
    padded = SamplingMask.from_sequences([lists[:1], lists[2:]], length=3)
    assert padded.offsets.tolist() == [0, 2, 2, 2, 3, 6, 6]
    assert SamplingMask.from_lists([[], []]).largest == -1 and len(SamplingMask.from_lists([])) == 0
    assert mask.places(torch.tensor([5, 3, 8, 9])).tolist() == [1, -1, -1, 5]
    for words, make in {
        "does not fit into length=1": lambda: SamplingMask.from_sequences([lists], length=1),
        "-3 is none": lambda: SamplingMask.from_lists([[-3]]),
        "rise from 0 to the number of its ids, 1": lambda: SamplingMask(ids[:1], offsets),
        "takes ids": lambda: SamplingMask(ids.float(), offsets),
        "rise from 0": lambda: SamplingMask(ids[:3], torch.tensor([0, 2, 1, 3])),
    }.items():
        with pytest.raises(ValueError, match=words):
            make()
    with pytest.raises(AttributeError, match="immutable"):
        mask.ids = ids


def test_a_long_sequence_sampled_at_top_p_has_a_gradient():
    """Without the mask log(kept mass) of every token multiplies up to nothing, or a sequence that is masked whole."""
    torch.manual_seed(0)
    logits = (2.0 * torch.randn(1, 200, 1000)).requires_grad_()
    config = GRPOLossConfig(importance_sampling_mode="sequence_mask", importance_sampling_clip_min=0.1)
    ordered, order = logits.detach().softmax(-1).sort(descending=True)
    kept = torch.zeros(1, 200, 1000, dtype=torch.bool).scatter_(-1, order, ordered.cumsum(-1) - ordered < 0.9)
    index = (logits.detach().masked_fill(~kept, -torch.inf).softmax(-1)[0]).multinomial(1).T
    mask = SamplingMask.from_scores(logits.detach().masked_fill(~kept, -torch.inf))
    norms = {}
    for name, own, used in (("whole", None, None), ("truncated", mask, None), ("replayed", mask, mask)):
        sampler = selective_log_softmax(logits.detach(), index, sampling_mask=own)
        old = selective_log_softmax(logits.detach(), index, sampling_mask=used)
        out = grpo_loss(
            logits, index, torch.ones(1), old_per_token_logps=old, sampling_per_token_logps=sampler,
            sampling_mask=used, config=config,
        )  # fmt: skip
        norms[name] = torch.autograd.grad(out.loss, logits)[0].norm().item()
    assert norms["truncated"] == 0.0 and 0.5 < norms["replayed"] / norms["whole"] < 2.0
