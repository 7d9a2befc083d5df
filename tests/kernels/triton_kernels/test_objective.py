"""The objective's kernels against `objective.py` on rows of log-probabilities, and the batch's against `batch.py`."""

import math
from dataclasses import fields, make_dataclass
from itertools import product

import pytest
import torch

from igrpo_kernels import GRPOLossConfig, triton_batch, triton_objective, triton_selection
from igrpo_kernels import batch as batch_module
from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.compiled_rows import CompiledRows
from igrpo_kernels.losses import LOSSES, ROLLOUT_RS, TermInputs, _covariance, _first, clip_cov_leaves
from igrpo_kernels.objective import (
    entropy_slope,
    grpo_objective,
    reduction_weights,
    rows,
    sampler_ratio,
    top_entropy_keep,
)
from igrpo_kernels.rejection import accepts
from tests.kernels.oracle import LOSS_LEVELS, REQUIRED

ONE_OF_A_TERM = [x for x in LOSS_LEVELS if x[0] == next(n for n, y in LOSSES.items() if y.term is LOSSES[x[0]].term)]
CLIPS = {"importance_sampling_clip_min": 0.8, "importance_sampling_clip_max": 1.2}
OPTIONS = {
    "plain": {},
    "k1": {"beta": 0.3, "kl_estimator": "k1", "entropy_coef": 0.1},
    "k2": {"beta": 0.3, "kl_estimator": "k2", "use_bias_correction_kl": False},
    "k3": {"beta": 0.3},
    "delta": {"delta": 1.05},
    "dual_clip": {"dual_clip": 1.05},
    **{mode: {"importance_sampling_mode": mode, **CLIPS} for mode in triton_objective._MODES[1:4]},
    "seq-mask-tis": {"importance_sampling_mode": "seq-mask-tis", **CLIPS, "importance_sampling_clip_max": 1.01},
    "sequence_mask": {"importance_sampling_mode": "sequence_mask", "importance_sampling_clip_min": 0.5},
    "weights": {"kl_tau": 0.2, "entropy_coef": 0.1, "importance_sampling_mode": "token_truncate", **CLIPS},
    "rejects": {
        "rollout_rs": "token_k2,seq_mean_k1,seq_max_k3",
        "rollout_rs_threshold": "0.008,0.9_1.04,0.05",
        "entropy_coef": 0.1,
        "importance_sampling_mode": "token_truncate",
        **CLIPS,
    },
    "top_entropy": {"top_entropy_quantile": 0.37, "entropy_coef": 0.1, "beta": 0.1, "off_policy_mask_threshold": 0.0},
    "opsm": {"off_policy_mask_threshold": 0.0, "beta": 0.1, "importance_sampling_mode": "token_mask", **CLIPS},
}
LENGTHS = (0, 300, 7, 1)  # an empty sequence, and one of several blocks


def applies(loss_type, level, name):
    """Every option of one loss of each term, and the others once: they differ in the reduction alone."""
    settings = {"delta", "dual_clip"} & OPTIONS[name].keys()
    if LOSSES[loss_type].term.takes_sampler and name.startswith("seq"):
        return False
    return settings <= set(LOSSES[loss_type].term.settings) and ((loss_type, level) in ONE_OF_A_TERM or name == "k1")


CASES = [(*case, name) for case, name in product(LOSS_LEVELS, OPTIONS) if applies(*case, name)]
SHARES = {"clip_cov": {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.01, "clip_cov_ub": 0.3}, "kl_cov": {"kl_cov_ratio": 0.2}}


def config_of(loss_type, level="token", **options):
    options |= {**REQUIRED, **SHARES}.get(loss_type, {})
    return GRPOLossConfig(loss_type, level, max_completion_length=9, **options)


def batch_of(layout, device, dtype=torch.float64, *, per_token=False, without=(), masked=True, weighted=False):
    """Log-probs, entropies and a batch whose ratios lie around the borders, with a NaN of the sampler."""
    generator = torch.Generator().manual_seed(0)
    n = sum(LENGTHS) if layout == "packed" else 4 * max(LENGTHS)
    shape = (n,) if layout == "packed" else (4, n // 4)
    draw = lambda scale: scale * torch.randn(n, generator=generator, dtype=torch.float64)  # noqa: E731
    old = -1.0 + draw(0.3)
    logps, ref, sampling, entropy = old + draw(0.2), old + draw(0.2), old + draw(0.1), draw(0.5).abs()
    sampling[::17] = torch.nan
    mask = torch.rand(n, generator=generator) > 0.2
    if layout == "padded":
        mask &= (torch.arange(n // 4) < torch.tensor(LENGTHS)[:, None]).reshape(-1)
    advantages = draw(1.0).view(shape) if per_token else torch.tensor([1.0, -1.0, 0.7, 0.0])
    given = {"old_per_token_logps": old, "ref_per_token_logps": ref, "sampling_per_token_logps": sampling}
    cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], device=device)
    weights = {}
    if weighted:  # zeros among them; one kind per token, the other per sequence
        of_tokens, of_sequences = draw(1.0).clamp(min=0.0).view(shape), torch.tensor([2.0, 0.5, 0.0, 1.5])
        weights = {"loss_weights": of_tokens, "nll_weights": of_sequences}
        if per_token:
            weights = dict(zip(weights, reversed(weights.values()), strict=True))
    batch = TokenBatch.build(
        torch.zeros(shape, dtype=torch.int64, device=device), advantages.to(dtype).to(device), dtype=dtype,
        completion_mask=mask.view(shape).to(device) if masked else None,
        cu_seqlens=cu_seqlens if layout == "packed" else None,
        prompt_lengths=torch.tensor([307, 307, 0, 9], device=device),
        **{k: v.view(shape).to(dtype).to(device) for k, v in given.items() if k not in without},
        **{k: v.to(dtype).to(device) for k, v in weights.items()},
    )  # fmt: skip
    return [x.to(dtype).to(device) for x in (logps, entropy)], batch


def compare(leaves, batch, config, num_items, *, extreme=False):
    results = []
    for objective in (grpo_objective, triton_objective.grpo_objective):
        logps, entropy = (x.clone().requires_grad_() for x in leaves)
        loss, metrics = objective(logps, entropy, batch, config, num_items)
        (1.7 * loss).backward()
        results.append({"loss": loss, **metrics, "dlogps": logps.grad, "dentropy": entropy.grad})
    truth, ours = results
    assert extreme or truth["dlogps"].any()
    if extreme:  # infinite, nearly infinite and NaN gradients are alike: which they are is the order of the products
        for result in results:
            result["dlogps"] = result["dlogps"].masked_fill(~(result["dlogps"].abs() < 1e300), torch.nan)
    assert ours.keys() == truth.keys() and (ours["dentropy"] is None) == (config.entropy_coef == 0.0)
    for name, value in truth.items():
        if value is not None:
            close = {"rtol": 1e-12, "atol": 1e-15, "equal_nan": True}
            torch.testing.assert_close(ours[name], value, **close, msg=lambda words, name=name: f"{name}: {words}")


@pytest.mark.parametrize(("loss_type", "level", "name"), CASES)
def test_every_loss(device, loss_type, level, name):
    i = CASES.index((loss_type, level, name))  # layouts and inputs take turns
    config = config_of(loss_type, level, **OPTIONS[name])
    how = {"per_token": i % 5 == 0, "masked": i % 3 > 0, "weighted": name == "weights"}
    leaves, batch = batch_of(("padded", "packed")[i % 2], device, **how)
    assert triton_objective.covers(batch, config)
    compare(leaves, batch, config, (None, 17, torch.tensor(23, device=device))[i % 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    "options",
    [{"weighted": True}, {"masked": False, "per_token": True, "weighted": True, "without": ("old_per_token_logps",)}],
)
def test_the_batch(device, layout, dtype, options, monkeypatch):
    _, plain = batch_of(layout, device, dtype, **options)
    build = TokenBatch.build
    monkeypatch.setattr(TokenBatch, "build", lambda *a, **k: build(*a, **k, tables=triton_batch.token_tables))
    _, launched = batch_of(layout, device, dtype, **options)
    for field in fields(TokenBatch):
        true, ours = getattr(plain, field.name), getattr(launched, field.name)
        if isinstance(true, torch.Tensor):
            assert true.dtype == ours.dtype and true.shape == ours.shape, field.name
            torch.testing.assert_close(ours, true, rtol=0, atol=0, equal_nan=True, msg=field.name)
        else:
            assert true == ours, field.name


def test_the_batch_of_views_and_narrow_types(device):
    """Expanded and sliced inputs, int32 ids and offsets, masks of floats, rows before and behind the sequences."""
    ids = torch.arange(24, dtype=torch.int32, device=device).view(4, 6)[:, 1:5]
    given = {
        "completion_mask": torch.tensor([[1.0, 0.0, 1.0, 1.0]], device=device).expand(4, 4),
        "old_per_token_logps": torch.arange(16.0, device=device, dtype=torch.bfloat16).view(4, 4).T,
        "sampling_per_token_logps": torch.arange(16.0, device=device, dtype=torch.float64).view(4, 4).requires_grad_(),
    }
    advantages = torch.arange(8.0, device=device)[::2]
    offsets = torch.tensor([0, 0, 4, 10, 16], dtype=torch.int32, device=device)
    packed = {"cu_seqlens": offsets, **{k: v.reshape(-1) for k, v in given.items()}}
    for call in (
        lambda **o: TokenBatch.build(ids, advantages, dtype=torch.float32, **given, **o),
        lambda **o: TokenBatch.build(ids.reshape(-1), advantages, dtype=torch.float32, **packed, **o),
    ):
        plain, launched = call(), call(tables=triton_batch.token_tables)
        for field in fields(TokenBatch):
            true, ours = getattr(plain, field.name), getattr(launched, field.name)
            assert torch.equal(true, ours) if isinstance(true, torch.Tensor) else true == ours, field.name


def test_offsets_that_no_host_checked_leave_rows_out(device, monkeypatch):
    monkeypatch.setattr(batch_module, "values_may_be_read", lambda x: False)  # as on a GPU
    offsets = torch.tensor([2, 5, 9], device=device)
    given = (torch.ones(12, dtype=torch.int64, device=device), torch.ones(2, device=device))
    plain, launched = (
        TokenBatch.build(*given, dtype=torch.float32, cu_seqlens=offsets, tables=tables)
        for tables in (None, triton_batch.token_tables)
    )
    for name in ("index", "mask", "seq_id", "advantages", "lengths"):
        assert torch.equal(getattr(plain, name), getattr(launched, name)), name
    weights, *_ = triton_objective.row_weights(launched, GRPOLossConfig(), None, of_tokens=False)
    assert torch.equal(weights, reduction_weights(plain, GRPOLossConfig(), None))


@pytest.mark.parametrize("mode", [None, *triton_objective._MODES[1:]])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "prompt_mean"])  # a reduction each
def test_row_weights(device, loss_type, layout, mode):
    config = GRPOLossConfig(
        loss_type, max_completion_length=9, entropy_coef=0.1, importance_sampling_mode=mode, **CLIPS
    )
    _, batch = batch_of(layout, device, weighted=mode is None)
    for num_items in (None, 17.5, 0.25, torch.tensor([23], device=device)):
        weights, ratio, slope = triton_objective.row_weights(batch, config, num_items, of_tokens=False)
        torch.testing.assert_close(weights, reduction_weights(batch, config, num_items), rtol=1e-14, atol=0)
        torch.testing.assert_close(slope, entropy_slope(batch, config), rtol=1e-14, atol=0)
        assert (ratio is not None) == (mode or "").startswith("seq")
        if ratio is not None:
            true = rows(sampler_ratio(batch.old_per_token_logps, batch, config), batch, config)
            torch.testing.assert_close(ratio, batch.masked(true), rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", ["sequence_mask", "token_mask", "weights", "rejects", "plain"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_rows_of_the_cuda_kernels(device, layout, options):
    """Every row's own ratio and entropy slope, with which `impl="cuda"` saves its operators."""
    config = GRPOLossConfig("dapo", **{"entropy_coef": 0.1, **OPTIONS[options]})
    _, batch = batch_of(layout, device, weighted=options == "weights")
    ours = triton_objective.row_weights(batch, config, 23.0, of_tokens=True)
    true = CompiledRows("cpu")._row_weights(batch, config, 23.0)
    for x, y in zip(ours, true, strict=True):
        assert (x is None) == (y is None)
        if y is not None:
            torch.testing.assert_close(x, batch.masked(y), rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [*ROLLOUT_RS, ", ".join(ROLLOUT_RS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rejection_at_its_thresholds(device, options, dtype):
    """u of exactly ln 2 and 2, which are the bounds of k1 and k2; none, infinite ones and such as end at 20."""
    u = torch.tensor([math.log(2.0), -math.log(2.0), 2.0, -2.0, math.nan, math.inf, -math.inf, 30.0, 0.0], dtype=dtype)
    u = torch.stack([u, *(x.expand(9) for x in u), torch.tensor([-2.0, 2.0] + [0.0] * 7, dtype=dtype)]).to(device)
    mask = torch.ones_like(u, dtype=torch.bool)
    mask[1:8:2, 1:], mask[2:8:2, 4:], mask[9:] = False, False, False
    zeros = torch.zeros_like(u)
    batch = TokenBatch.build(
        zeros.long(), zeros[:, 0] + 1.0, dtype=dtype, completion_mask=mask,
        old_per_token_logps=zeros, sampling_per_token_logps=-u,
    )  # fmt: skip
    config = GRPOLossConfig(rollout_rs=options, rollout_rs_threshold=2.0)
    accepted = accepts(batch.old_per_token_logps, batch, config)
    _, kept, _ = triton_objective.row_weights(batch, config, None, of_tokens=False)
    assert torch.equal(kept != 0, accepted & batch.mask) and 0 < int((kept != 0).sum()) < int(batch.mask.sum())
    _, metrics = triton_objective.grpo_objective(batch.old_per_token_logps, None, batch, config)
    _, true = grpo_objective(batch.old_per_token_logps, None, batch, config)
    name = "sampling/rollout_rs_masked_fraction"
    torch.testing.assert_close(metrics[name], true[name], rtol=1e-6, atol=0)


def rows_with_ties(device, dtype, n):
    """Log-probs, advantages and entropies of few values, whose sums are exact; a third of the rows is masked."""
    generator = torch.Generator().manual_seed(n)
    draw = lambda high: torch.randint(high, (1, n), generator=generator).to(dtype) / 4  # noqa: E731
    mask = torch.rand(1, n, generator=generator) > 0.3
    batch = TokenBatch.build(
        torch.randint(9, (1, n), generator=generator).to(device), (draw(8) - 1.0).to(device), dtype=dtype,
        completion_mask=mask.to(device), old_per_token_logps=(-draw(8)).to(device),
    )  # fmt: skip
    return (-draw(8)[0]).to(device), draw(12)[0].to(device), batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 7, 2500])  # the last in several blocks
def test_the_quantile_at_ties(device, dtype, n):
    _, entropy, batch = rows_with_ties(device, dtype, n)
    for poison in (None, 0.0, math.nan):
        if poison is not None:
            entropy[::5] = poison
            entropy[::10] *= -1.0
        for share in (0.0, 0.25, 1 / 3, 0.9):
            config = GRPOLossConfig(top_entropy_quantile=share)
            keep, count = triton_selection.high_entropy_rows(entropy, batch, config)
            true = top_entropy_keep(entropy, batch, share)
            assert torch.equal(keep.bool(), true) and int(count) == int(true.sum()), (poison, share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 7, 2500])
@pytest.mark.parametrize("loss_type", ["clip_cov", "kl_cov"])
def test_draws_at_ties(device, dtype, n, loss_type):
    """As many of the equal rows at the border as fit, the first ones."""
    logps, _, batch = rows_with_ties(device, dtype, n)
    for poison in (None, -math.inf, math.nan):
        if poison is not None:
            logps[::9] = poison
        for share in (1e-4, 0.3, 1.0):
            key = {f"{loss_type}_ratio": share} | ({"clip_cov_lb": 0.0} if loss_type == "clip_cov" else {})
            config, old = GRPOLossConfig(loss_type, **key), batch.old_per_token_logps
            own = batch.masked(logps)
            terms = TermInputs(own, old, own - old, (own - old).exp(), batch.advantages, None, batch)
            if loss_type == "clip_cov":
                true = clip_cov_leaves(terms, config)
            else:
                covariance = _covariance(terms).masked_fill(~batch.mask, -math.inf)
                true = batch.mask & _first(-covariance, share, batch)
            assert torch.equal(triton_selection.drawn_rows(own, batch, config).bool(), true), (poison, share)


@pytest.mark.parametrize("mode", triton_objective._MODES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_without_old_log_probs(device, level, mode):
    config = GRPOLossConfig("bnpo", level, beta=0.1, entropy_coef=0.1, importance_sampling_mode=mode, **CLIPS)
    leaves, batch = batch_of("packed", device, without=("old_per_token_logps",))
    compare(leaves, batch, config, None)


@pytest.mark.parametrize(("loss_type", "mode"), [("vespo", "token_truncate"), ("gmpo", "token_mask"), ("sapo", None)])
def test_sequences_without_old_log_probs(device, loss_type, mode):
    config = GRPOLossConfig(loss_type, off_policy_mask_threshold=-0.1, importance_sampling_mode=mode, **CLIPS)
    for without in (("old_per_token_logps",), ("old_per_token_logps", "sampling_per_token_logps")):
        leaves, batch = batch_of("padded", device, without=without)
        compare(leaves, batch, config, None)


@pytest.mark.parametrize(
    "option", [{}, {"beta": 0.1, "importance_sampling_mode": "token_mask", "off_policy_mask_threshold": 0.0}]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 200.0, -2000.0])
@pytest.mark.parametrize(("loss_type", "level"), ONE_OF_A_TERM)
def test_extreme_ratios(device, loss_type, level, value, option):
    """0 · inf = 0, and a NaN shows: in one token of advantage > 0, one < 0 and one of a sequence without advantage."""
    leaves, batch = batch_of("packed", device)
    rows_there = [int(batch.mask[300:].nonzero()[0]) + 300, *batch.mask[:300].nonzero()[:1].flatten().tolist()]
    batch.old_per_token_logps[rows_there] = value
    compare(leaves, batch, config_of(loss_type, level, **option), None, extreme=True)


@pytest.mark.parametrize(("loss_type", "level"), ONE_OF_A_TERM)
def test_an_advantage_that_is_nan_shows_in_the_loss(device, loss_type, level):
    """Once it did in the gradient alone, under a loss that looked healthy."""
    leaves, batch = batch_of("packed", device, per_token=True)
    batch.advantages[int(batch.mask[:300].nonzero()[0])] = torch.nan
    loss, _ = triton_objective.grpo_objective(leaves[0], None, batch, config_of(loss_type, level))
    assert loss.isnan()


UNBOUNDED = {"importance_sampling_clip_min": 0.5, "importance_sampling_clip_max": None}


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("sampling_per_token_logps", -torch.inf, {"importance_sampling_mode": "token_mask", **UNBOUNDED}),
        ("sampling_per_token_logps", -torch.inf, {"importance_sampling_mode": "sequence_truncate", **UNBOUNDED}),
        ("sampling_per_token_logps", -torch.inf, {"importance_sampling_mode": "seq-mask-tis", **UNBOUNDED}),
        ("ref_per_token_logps", torch.inf, {"beta": 0.3, "kl_estimator": "k1", "use_bias_correction_kl": False}),
    ],
)
@pytest.mark.parametrize(("loss_type", "level"), ONE_OF_A_TERM)
def test_a_sampler_without_bound_and_an_infinite_reference(device, loss_type, level, name, value, option):
    """A token of advantage 0 and a clipped one have no gradient of the policy term, whatever the sampler said."""
    if LOSSES[loss_type].term.takes_sampler and "seq" in option.get("importance_sampling_mode", ""):
        option = {**option, "importance_sampling_mode": "token_truncate"}
    leaves, batch = batch_of("packed", device)
    there = [int(batch.mask[:300].nonzero()[0]), int(batch.mask[300:307].nonzero()[0]) + 300, 307]
    batch.mask[307], batch.lengths[3] = True, 1.0
    getattr(batch, name)[there] = value
    leaves[0][there[:2]] = batch.old_per_token_logps[there[:2]] + torch.tensor([-2.0, 2.0], device=device).double()
    config = config_of(loss_type, level, **option)
    compare(leaves, batch, config, None, extreme=True)
    logps = leaves[0].requires_grad_()
    triton_objective.grpo_objective(logps, None, batch, config)[0].backward()
    if config.loss.term.of_advantage:
        torch.testing.assert_close(logps.grad[307], config.beta * reduction_weights(batch, config, None)[307])


def test_what_the_kernels_do_not_know_is_left_to_the_objective(device):
    _, batch = batch_of("padded", device)
    assert triton_objective.covers(batch, GRPOLossConfig())
    named = {f.name for f in fields(TokenBatch)}
    assert named == triton_objective._TENSORS and {f.name for f in fields(GRPOLossConfig)} == triton_objective._SETTINGS
    new = make_dataclass("New", [("another", torch.Tensor | None, None)], bases=(TokenBatch,), frozen=True)
    values = {f.name: getattr(batch, f.name) for f in fields(TokenBatch)}
    assert triton_objective.covers(new(**values), GRPOLossConfig())
    assert not triton_objective.covers(new(**values, another=batch.old_per_token_logps), GRPOLossConfig())
    setting = make_dataclass("Setting", [("another", float, 0.0)], bases=(GRPOLossConfig,), frozen=True)
    assert triton_objective.covers(batch, setting()) and not triton_objective.covers(batch, setting(another=0.1))
