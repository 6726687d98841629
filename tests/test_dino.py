"""dino.py against its definitions: plain loops in float64, gradients through those loops, two processes against one."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dino import (PROTOTYPE_NORM, STUDENT_TEMPERATURE, DINOHead, build_networks, centered, contrast_loss, dino_loss,
                  gram_loss, ibot_loss, koleo_loss, objective, sinkhorn_knopp, update_teacher)

OFFSETS = 7
LARGEST = torch.finfo(torch.float32).max


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def probabilities(*shape, seed=1):
    return (2 * randn(*shape, seed=seed)).softmax(dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# the definitions, one number at a time

def plain_sinkhorn(logits, temperature, iterations=3):
    q = np.exp(logits.double().numpy() / temperature)
    q /= q.sum()
    R, K = q.shape
    for _ in range(iterations):
        for k in range(K):
            q[:, k] /= q[:, k].sum() * K
        for r in range(R):
            q[r] /= q[r].sum() * R
    return torch.from_numpy(q * R)


def plain_cross_entropy(logits, probs):
    """- sum_k probs[k] log softmax(logits / 0.1)[k] of one row."""
    partition = sum(torch.exp(z / 0.1) for z in logits)
    return -sum(p * torch.log(torch.exp(z / 0.1) / partition) for z, p in zip(logits, probs))


def plain_dino(student, teacher, ignore_diagonal=False):
    terms = [plain_cross_entropy(student[s, b], teacher[t, b]) for s in range(len(student)) for t in range(len(teacher))
             for b in range(student.shape[1]) if not (ignore_diagonal and s == t)]
    return sum(terms) / len(terms)


def plain_ibot(student, teacher, weights, num_crops):
    return sum(w * plain_cross_entropy(s, t) for s, t, w in zip(student, teacher, weights)) / num_crops


def plain_koleo(x):
    unit = [row / torch.sqrt((row ** 2).sum()) for row in x]
    total = 0.0
    for i, row in enumerate(unit):
        others = [other for j, other in enumerate(unit) if j != i]
        nearest = others[int(np.argmax([(row @ other).item() for other in others]))]
        total = total - torch.log(torch.sqrt(((row - nearest + 1e-8) ** 2).sum()) + 1e-8)
    return total / len(unit)


def plain_contrast(x, num_anchors):
    def cosine(a, b):
        return a @ b / torch.sqrt((a @ a) * (b @ b))
    terms = []
    for v in range(len(x)):
        for t in range(num_anchors):
            for b in range(x.shape[1] if v != t else 0):
                all_ = [torch.exp(cosine(x[v, b], x[t, c]) / 0.15) for c in range(x.shape[1])]
                terms.append(-torch.log(all_[b] / sum(all_)))
    return sum(terms) / len(terms)


def plain_gram(student, teacher):
    def cosine(a, b):
        return a @ b / torch.sqrt((a @ a) * (b @ b))
    terms = [(cosine(s[i], s[j]) - cosine(t[i], t[j])) ** 2
             for s, t in zip(student, teacher) for i in range(len(s)) for j in range(len(s))]
    return sum(terms) / len(terms)


def plain_centered(x, position):
    rows = list(zip(x.double(), position.tolist()))
    return torch.stack([row - torch.stack([other for other, at in rows if at == here]).mean(0) for row, here in rows])


def assert_same_loss(loss, plain, x, *rest):
    """loss(x, *rest) in fp32 equals plain(...) in fp64, and so does its gradient for x. fp32 holds 1e-7 a term."""
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    value = loss(ours, *rest)
    expected = plain(theirs, *(r.double() if torch.is_tensor(r) else r for r in rest))
    assert value.dtype == torch.float32 and value.shape == ()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    value.backward()
    expected.backward()
    scale = theirs.grad.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=2e-6 * scale)


# ---------------------------------------------------------------------------------------------------------------------
# Sinkhorn-Knopp

@pytest.mark.parametrize("R, K, temperature", [(7, 5, 0.04), (5, 7, 0.07), (48, 16, 0.03), (6, 40, 0.1), (1, 9, 0.04),
                                               (9, 1, 0.04)])
def test_sinkhorn_equals_definition(R, K, temperature):
    logits = 0.5 * randn(R, K)
    logits[:, 0] += 0.5                                                # one prototype that all rows like best
    probs = sinkhorn_knopp(logits, temperature)
    torch.testing.assert_close(probs.double(), plain_sinkhorn(logits, temperature), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(R), rtol=0, atol=1e-6)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_sinkhorn_iterations(iterations):
    logits = randn(12, 6)
    expected = plain_sinkhorn(logits, 0.1, iterations)
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.1, iterations).double(), expected, rtol=1e-4, atol=1e-7)


def test_sinkhorn_shares_prototypes_equally():
    logits = 0.1 * randn(64, 16)
    logits[:, 3] += 1.0
    assert (logits / 0.05).softmax(dim=1).sum(dim=0)[3] > 63           # left to themselves, all rows take the same one
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.05).sum(dim=0), torch.full((16,), 4.0), rtol=0.2, atol=0)


def test_sinkhorn_temperature_may_be_a_tensor():
    logits = randn(8, 6)
    assert torch.equal(sinkhorn_knopp(logits, torch.tensor(0.05)), sinkhorn_knopp(logits, 0.05))
    assert not torch.allclose(sinkhorn_knopp(logits, torch.tensor(0.2)), sinkhorn_knopp(logits, 0.05))


def test_sinkhorn_is_blind_to_a_constant_that_would_overflow():
    logits = torch.round(16 * randn(6, 8)) / 16
    expected = plain_sinkhorn(logits, 0.1)
    torch.testing.assert_close(sinkhorn_knopp(logits + 2.0 ** 16, 0.1).double(), expected, rtol=1e-4, atol=1e-7)


EXTREME = {"checkerboard": torch.tensor([[LARGEST, -LARGEST], [-LARGEST, LARGEST]]).repeat(3, 4),
           "one row below all": torch.cat((torch.full((4, 6), LARGEST), torch.full((1, 6), -LARGEST))),
           "one prototype above all": torch.cat((torch.full((5, 1), LARGEST), -LARGEST * torch.ones(5, 3)), dim=1),
           "all the same": torch.full((4, 6), LARGEST), "all lowest": torch.full((4, 6), -LARGEST),
           "random signs": torch.where(randn(20, 6) > 0.7, LARGEST, -LARGEST),
           "large": (1e38 * randn(20, 6)).clamp(-LARGEST, LARGEST),
           "mixed scales": 10 ** (19 + 10 * randn(20, 6)).clamp(0, 38) * randn(20, 6, seed=1).sign(),
           "one row": torch.tensor([[LARGEST, 0.0, -LARGEST]]),
           "one column": torch.tensor([[LARGEST], [0.0], [-LARGEST]])}


@pytest.mark.parametrize("case", EXTREME)
def test_sinkhorn_of_any_finite_logits(case):
    logits = EXTREME[case]
    assert logits.isfinite().all()
    probs = sinkhorn_knopp(logits, 0.03)
    assert (probs >= 0).all()
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(len(logits)), rtol=0, atol=1e-5)


def test_sinkhorn_of_no_rows():
    assert sinkhorn_knopp(torch.empty(0, 5), 0.04).shape == (0, 5)


def test_targets_carry_no_gradient():
    assert not sinkhorn_knopp(randn(4, 6).requires_grad_(), 0.04).requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# the mean of a lead and a time

POSITION = torch.tensor([4, 0, 4, 1, 1, 4, 0, 7])                      # of eight rows; 7 has one, four have none


def test_centered():
    x = randn(8, 6)
    found = centered(x, POSITION, 9)
    torch.testing.assert_close(found.double(), plain_centered(x, POSITION), rtol=0, atol=1e-6)
    assert torch.equal(found[7], torch.zeros(6))                       # alone at its position
    assert not centered(x.requires_grad_(), POSITION, 9).requires_grad
    assert centered(x[:0], POSITION[:0], 9).shape == (0, 6)


def test_centered_does_not_depend_on_other_positions():
    x, here = randn(8, 6), POSITION == 4
    torch.testing.assert_close(centered(x, POSITION, 9)[here], centered(x[here], POSITION[here], 5), rtol=0, atol=1e-6)


def test_autocast_does_not_lower_the_precision_of_centered():
    x = 1e-3 * randn(8, 6) + randn(6, seed=5)                          # far from 0 and close together
    with torch.autocast("cpu", torch.bfloat16):
        found = centered(x, POSITION, 9)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), plain_centered(x, POSITION), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_centered_of_low_precision_is_rounded_once(dtype):
    x = randn(8, 6).to(dtype)
    found = centered(x, POSITION, 9)
    assert found.dtype == dtype
    expected = plain_centered(x, POSITION)
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# losses

def test_student_temperature():
    assert STUDENT_TEMPERATURE == 0.1


@pytest.mark.parametrize("S, T, ignore_diagonal", [(2, 2, True), (2, 2, False), (4, 2, False), (4, 2, True),
                                                   (2, 3, True), (1, 1, False)])
def test_dino_loss(S, T, ignore_diagonal):
    assert_same_loss(dino_loss, plain_dino, randn(S, 3, 5), probabilities(T, 3, 5), ignore_diagonal)


def test_ibot_loss():
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2, 1.0])
    assert_same_loss(ibot_loss, plain_ibot, randn(6, 7), probabilities(6, 7), weights, 5)


def test_ibot_loss_without_masked_patches():
    logits = torch.empty(0, 7, requires_grad=True)
    loss = ibot_loss(logits, torch.empty(0, 7), torch.empty(0), 4)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("B", [2, 9])
def test_koleo_loss(B):
    assert_same_loss(koleo_loss, plain_koleo, 3 * randn(B, 6))


def test_koleo_of_duplicates_is_finite_and_large():
    x = randn(6, 8)
    x[3] = x[1]
    x.requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert loss.item() > 5                                     # two rows of six at - log(1e-8 + 1e-8 sqrt(8)) = 17
    torch.testing.assert_close(loss.double(), plain_koleo(x.double()), rtol=1e-4, atol=0)
    assert x.grad.isfinite().all()


def test_koleo_of_one_recording_is_zero():
    x = randn(1, 6).requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert loss.item() == 0 and torch.equal(x.grad, torch.zeros(1, 6))


@pytest.mark.parametrize("V, num_anchors", [(2, 2), (5, 2), (3, 1)])
def test_contrast_loss(V, num_anchors):
    assert_same_loss(contrast_loss, plain_contrast, randn(V, 4, 6), num_anchors)


@pytest.mark.parametrize("B", [1, 3])
def test_gram_loss(B):
    assert_same_loss(gram_loss, plain_gram, randn(B, 4, 5), 2 * randn(B, 4, 5, seed=1))


def test_gram_loss_is_about_directions_only():
    x = randn(2, 5, 8)
    rotation = torch.linalg.qr(randn(8, 8))[0]
    torch.testing.assert_close(gram_loss(x, 3 * x @ rotation), torch.tensor(0.0), rtol=0, atol=1e-10)


LOSSES = {"dino": lambda x: dino_loss(x[None], probabilities(2, 8, 16)),
          "ibot": lambda x: ibot_loss(x, probabilities(8, 16), torch.full((8,), 0.5), 3),
          "koleo": koleo_loss, "contrast": lambda x: contrast_loss(torch.stack((x, x.flip(0), x.roll(1, 0))), 2),
          "gram": lambda x: gram_loss(x[None], randn(1, 8, 16, seed=3)),
          "sinkhorn": lambda x: sinkhorn_knopp(x, 0.05)}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_fp32(name, dtype):
    x = randn(8, 16).to(dtype)
    value = LOSSES[name](x)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, LOSSES[name](x.float()), rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_lower_the_precision(name):
    x = 0.01 * randn(8, 16) + randn(16, seed=5)                        # close together, as features are at first
    with torch.autocast("cpu", torch.bfloat16):
        value = LOSSES[name](x)
    torch.testing.assert_close(value, LOSSES[name](x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["dino", "ibot"])
@pytest.mark.parametrize("logits", [torch.where(randn(8, 16) > 0, LARGEST, -LARGEST), 1e20 * randn(8, 16),
                                    1e4 * randn(8, 16)], ids=["largest", "1e20", "1e4"])
def test_losses_of_huge_logits_are_finite(name, logits):
    logits = logits.clone().requires_grad_()
    loss = LOSSES[name](logits)
    loss.backward()
    assert loss.isfinite() and loss > 0 and logits.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# heads and teacher

@pytest.fixture(scope="module")
def networks():
    from model import build_encoder  # here: the processes that import this file for one function do not need it
    return build_networks(build_encoder("tiny"), hidden_dim=64, bottleneck_dim=128, cls_prototypes=256,
                          patch_prototypes=128, offsets=OFFSETS)


def test_head_shapes_and_parameters():
    head = DINOHead(24, 40, 16, 50)
    assert head(randn(2, 3, 24)).shape == (2, 3, 50)
    # Weight norm would show as other parameters (weight_g, original0); the prototypes have no bias either.
    shapes = sorted(tuple(p.shape) for p in head.parameters())
    assert shapes == [(16,), (16, 40), (40,), (40,), (40, 24), (40, 40), (50, 16)]


def test_head_puts_the_bottleneck_on_the_unit_sphere_and_leaves_prototypes_free():
    head = DINOHead(24, 40, 16, 16)
    x = randn(5, 24)
    with torch.no_grad():
        before = head(x)
        head.prototypes.weight.mul_(3)
        torch.testing.assert_close(head(x), 3 * before)                # with weight norm nothing would change
        head.prototypes.weight.copy_(torch.eye(16))
        torch.testing.assert_close(head(x).norm(dim=-1), torch.ones(5))
        last = head.mlp[-1]
        last.weight.mul_(7)
        torch.testing.assert_close(head(x).norm(dim=-1), torch.ones(5))


def test_head_init():
    head = DINOHead(256, 256, 256, 512)
    for name, p in head.mlp.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.zeros_like(p)), name
        else:
            assert p.abs().max() <= 0.04, name
            assert p.std().item() == pytest.approx(0.0176, rel=0.02), name       # normal 0.02, cut at two deviations
    assert head.prototypes.weight.norm(dim=1).mean().item() == pytest.approx(PROTOTYPE_NORM, rel=0.02)
    assert abs(head.prototypes.weight.mean().item()) < 0.01 * PROTOTYPE_NORM


def test_heads_differ_from_each_other(networks):
    student, _ = networks
    assert not torch.equal(student["dino_head"].mlp[0].weight, student["ibot_head"].mlp[0].weight)


@torch.no_grad()
def test_loss_starts_at_ln_k(networks):
    student, teacher = networks
    features = student["encoder"](0.3 * randn(16, 2, 250), torch.ones(16, 2, dtype=torch.long)).pooled()
    probs = sinkhorn_knopp(teacher["dino_head"](features), 0.04)
    loss = dino_loss(student["dino_head"](features)[None], probs[None])
    entropy = -(probs * probs.clamp(min=1e-30).log()).sum(dim=1).mean()
    assert 0.5 * math.log(256) < entropy                               # targets that mean something
    assert loss.item() == pytest.approx(math.log(256), rel=0.1)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.996, 1.0])
def test_teacher_is_the_moving_average(networks, momentum):
    student, teacher = map(copy.deepcopy, networks)
    before = {name: p.double() for name, p in teacher.named_parameters()}
    for i, p in enumerate(student.parameters()):
        p.data.add_(randn(*p.shape, seed=i))
    update_teacher(teacher, student, momentum)
    after = dict(teacher.named_parameters())
    shared = {name: p for name, p in student.named_parameters() if not name.startswith(("wave_head", "context_head"))}
    assert set(before) == set(after) == set(shared)
    for name, p in shared.items():
        expected = momentum * before[name] + (1 - momentum) * p.double()
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_teacher_is_a_frozen_copy(networks):
    student, teacher = networks
    assert not teacher.training
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    for (name, p), q in zip(teacher.named_parameters(), student.parameters()):
        assert torch.equal(p, q) and not p.requires_grad and q.requires_grad, name


# ---------------------------------------------------------------------------------------------------------------------
# the objective on a batch

def small_networks(width=16, prototypes=6):
    from model import Encoder
    networks = build_networks(Encoder(width=width, depth=1, heads=2, layer_scale=1.0), 24, 8, prototypes, prototypes,
                              OFFSETS)
    for i, p in enumerate(networks[1].parameters()):                   # the teacher is not the student
        p.add_(0.1 * randn(*p.shape, seed=i))
    return networks


def lead_group(recordings, leads, patches, few, seed=0):
    """A lead group as cut_views makes it, of random signals; with views of one lead of three patches if `few`."""
    n, draw, views = 2 * recordings, torch.Generator().manual_seed(seed), []
    for k, (L, N) in enumerate([(leads, patches), (leads, 2), (1, 3)][:2 + few]):
        clean = 0.3 * randn(n, L, 50 * N, seed=10 * seed + k)
        named = torch.arange(1, 1 + L).repeat(n, 1)
        hidden = named * (torch.rand(n, L, generator=draw) < 0.8)
        views.append((clean + 0.1 * randn(n, L, 50 * N, seed=99), clean, hidden, named))
    masks = torch.rand(n, leads, patches, generator=draw) < 0.5
    masks[0] = False
    place = masks.flatten().nonzero().squeeze(1)
    asked = dict(token=torch.arange(2 * n) // 2 * 3 + torch.randint(3, (2 * n,), generator=draw),
                 target=torch.randint(masks.numel(), (2 * n,), generator=draw),
                 weight=torch.tensor([0.5, 0.5, 1.0, 0.0]).repeat(recordings))
    pairs = torch.randint(masks.numel(), (2, 5 * n), generator=draw)
    near = dict(token=pairs[0], target=pairs[1], offset=torch.randint(OFFSETS, (5 * n,), generator=draw))
    return dict(views=views, masks=masks, place=place, recordings=recordings, asked=asked if few else None, near=near,
                weights=1 / masks.sum((1, 2))[place // masks[0].numel()])


def plain_context(encoder, clean, named):
    """What the blocks of a teacher say of each patch (V, L, N, D), less the mean over views; channel by channel."""
    outputs = []
    hooks = [block.register_forward_hook(lambda *of: outputs.append(of[-1].view(len(clean), -1, encoder.width)))
             for block in encoder.blocks]
    V, L, N, D = encoder(clean, named).patches.shape
    for hook in hooks:
        hook.remove()
    total = 0
    for output in outputs:
        patches = output[:, -L * N:]                                   # after CLS and registers
        total += (patches - patches.mean(1, keepdim=True)) / (patches.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    mean = total / len(outputs)
    mean = (mean - mean.mean(-1, keepdim=True)) / (mean.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    return (mean - mean.mean(0)).view(V, L, N, D)


def plain_group(student, teacher, anchor, g, temperature, patch_temperature):
    """Parts of the loss of one lead group, and its teacher probabilities, patch by patch; networks in double."""
    n, (T, L, N) = g["recordings"], g["masks"].shape
    views = [student["encoder"](signal, ids, mask)
             for (signal, _, ids, _), mask in zip(g["views"], (g["masks"], None, None))]
    _, clean, _, named = g["views"][0]
    target = teacher["encoder"](clean, named)

    def points(head, x):
        x = head.mlp(x)
        return x / x.norm(dim=-1, keepdim=True)
    x = torch.cat([v.pooled() for v in views]).unflatten(0, (-1, n))
    on_sphere = points(student["dino_head"], x)
    logits = on_sphere @ student["dino_head"].prototypes.weight.T
    probs = plain_sinkhorn(teacher["dino_head"](target.pooled()), temperature).unflatten(0, (2, n))
    pairs = [(views[0].patches[c, lead, t], (c, lead, t), 1 / g["masks"][c].sum().item()) for c in range(T)
             for lead in range(L) for t in range(N) if g["masks"][c, lead, t]]
    masked = len(pairs)
    asked = g["asked"] or dict.fromkeys(("token", "target", "weight"), torch.empty(0))
    for token, place, weight in zip(*(asked[k].tolist() for k in ("token", "target", "weight"))):
        pairs.append((views[2].patches[token // 3, 0, token % 3], np.unravel_index(place, (T, L, N)), weight))
    theirs = points(teacher["ibot_head"], torch.stack([target.patches[place] for _, place, _ in pairs]))
    theirs = plain_centered(theirs, torch.tensor([lead * N + t for _, (_, lead, t), _ in pairs]))
    patch_probs = plain_sinkhorn(theirs @ teacher["ibot_head"].prototypes.weight.T, patch_temperature)
    terms = [w / T * plain_cross_entropy(student["ibot_head"](mine), p) for (mine, _, w), p in zip(pairs, patch_probs)]
    truth = dict(wave=teacher["encoder"].front_end(clean).flatten(0, 2),
                 context=plain_context(teacher["encoder"], clean, named).flatten(0, 2))

    def error(name, patch, place, offset):
        head = student[f"{name}_head"]
        told = head.rest(head.first(patch) + head.offset_vectors.weight[offset])
        return (told - truth[name][place]).square().mean()
    near, own = list(zip(*(g["near"][k] for k in ("token", "target", "offset")))), views[0].patches.flatten(0, 2)
    errors = {name: sum(error(name, own[token], place, offset) / len(near) for token, place, offset in near)
              + sum(w / T * error(name, own[place], place, 0) for place, (*_, w) in zip(g["place"], pairs))
              for name in truth}
    for token, place, weight in zip(*(asked[k].tolist() for k in ("token", "target", "weight"))):
        told = error("context", views[2].patches[token // 3, 0, token % 3], place, 0)
        errors["context"] = errors["context"] + weight / len(views[2].cls) * told
    parts = dict(dino=plain_dino(logits, probs, ignore_diagonal=True), ibot=sum(terms[:masked]),
                 dino_global=plain_dino(logits[:2], probs, ignore_diagonal=True),
                 dino_local=plain_dino(logits[2:], probs), koleo=plain_koleo(x[0]) + plain_koleo(x[1]),
                 contrast=plain_contrast(on_sphere, 2),
                 **errors,
                 gram=plain_gram(views[0].patches.flatten(1, 2), anchor(clean, named).patches.flatten(1, 2)))
    if g["asked"]:
        parts["leads"] = sum(terms[masked:])
    return parts, probs.flatten(0, 1), patch_probs


WEIGHTS = dict(dino=1.0, koleo=0.1, ibot=1.0, contrast=1.5, leads=0.5, wave=0.7, context=1.3, gram=3.0)
TEMPERATURES = 0.1, 0.08         # of global features and of patches
GROUPS = {"with and without views of few leads": [(3, 2, 4, True), (4, 1, 5, False)], "without": [(4, 2, 3, False)],
          "the same leads twice": [(3, 2, 4, True), (2, 2, 4, True)]}


@pytest.mark.parametrize("case", GROUPS)
def test_objective(case):
    """Loss, parts and gradient are those of plain loops over each lead group, by its share of the recordings."""
    student, teacher = small_networks()
    anchor = copy.deepcopy(student["encoder"]).requires_grad_(False)
    for i, p in enumerate(anchor.parameters()):
        p.add_(0.1 * randn(*p.shape, seed=100 + i))
    groups = [lead_group(*shape, seed=seed) for seed, shape in enumerate(GROUPS[case])]
    loss, parts, cls, logits = objective(student, teacher, anchor, groups, *TEMPERATURES, WEIGHTS)
    loss.backward()

    plain_student, *fixed = (copy.deepcopy(network).double() for network in (student, teacher, anchor))
    plain_student.zero_grad()
    B, expected, probs, patch_probs = sum(g["recordings"] for g in groups), {}, [], []
    for g in groups:
        found, *targets = plain_group(plain_student, *fixed, g, *TEMPERATURES)
        for name, value in found.items():
            expected[name] = expected.get(name, 0) + g["recordings"] / B * value
        probs.append(targets[0])
        patch_probs.append(targets[1])
    expected_loss = sum(WEIGHTS[name] * expected[name] for name in WEIGHTS if name in expected)
    expected_loss.backward()
    del expected["dino"]
    for name, p in (("target_entropy", probs), ("patch_target_entropy", patch_probs)):
        expected[name] = torch.special.entr(torch.cat(p)).sum(1).mean()
        assert 0.3 * math.log(6) < expected[name] < 0.99 * math.log(6)                 # targets that say something
    assert set(parts) == set(expected) and ("leads" in parts) == any(g["asked"] is not None for g in groups)
    for name, value in {**expected, "loss": expected_loss}.items():
        torch.testing.assert_close((parts | dict(loss=loss))[name].double(), value, rtol=2e-4, atol=1e-5, msg=name)
    assert cls.shape == (2, B, 32) and len(logits) == sum(len(v[0]) for g in groups for v in g["views"])
    for (name, p), q in zip(student.named_parameters(), plain_student.parameters()):
        scale = q.grad.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=0, atol=2e-3 * scale, msg=name)


def test_lead_groups_do_not_see_each_other():
    """A group's losses are the same beside any other group: Sinkhorn, centring and neighbours stay within it."""
    student, teacher = small_networks()
    first, *others = (lead_group(3, 2, 4, True, seed) for seed in range(3))
    others.append(lead_group(5, 1, 6, False, 3))

    def parts(*groups):
        return {k: v.item() * sum(g["recordings"] for g in groups) for k, v in objective(
            student, teacher, None, groups, 0.05, 0.05, WEIGHTS)[1].items() if "entropy" not in k}
    alone = parts(first)
    for other in others:
        by_itself, both = parts(other), parts(first, other)
        for name in alone:
            assert both[name] == pytest.approx(alone[name] + by_itself.get(name, 0), rel=1e-4), name


def test_objective_with_a_patch_that_no_teacher_sees():
    """A view of few leads whose leads the teacher does not see adds nothing; all views count all the same."""
    student, teacher = small_networks()
    group = lead_group(3, 2, 4, True)
    half = copy.deepcopy(group)
    half["asked"]["weight"][::2] = 0
    none = copy.deepcopy(group)
    none["asked"]["weight"][:] = 0
    a, b, c = (objective(student, teacher, None, [g], 0.05, 0.05, WEIGHTS)[1] for g in (group, half, none))
    assert c["leads"] == 0 and 0 < b["leads"] < a["leads"] and 0 < c["context"] < b["context"] < a["context"]
    assert all(a[name] == b[name] == c[name] for name in a if name not in ("leads", "context"))


# ---------------------------------------------------------------------------------------------------------------------
# two processes

ROWS = {"unequal": (5, 2), "none on one": (7, 0), "equal": (4, 4)}


def rank_inputs(case, extreme=False):
    """The rows of both ranks: logits (R, 6)."""
    logits = randn(sum(ROWS[case]), 6, seed=7)
    return torch.where(logits > 0.5, LARGEST, -LARGEST) if extreme else logits


def rows_at(case):
    """The rows of both ranks: x (R, 6) and position (R,)."""
    R = sum(ROWS[case])
    return randn(R, 6, seed=8), torch.arange(R) * 3 % 4


def run_rank(rank, folder):
    """What each of two processes computes; the results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for case, sizes in ROWS.items():
        for extreme in (False, True):
            results[f"sinkhorn {case} {extreme}"] = sinkhorn_knopp(rank_inputs(case, extreme).split(sizes)[rank], 0.1)
        results[f"centered {case}"] = centered(*(t.split(sizes)[rank] for t in rows_at(case)), 4)
    for B in (1, 4):
        x = randn(2 * B, 5, seed=B).split(B)[rank].requires_grad_()
        loss = koleo_loss(x)
        loss.backward()
        results[f"koleo {B}"] = (loss.detach(), x.grad)
    x = randn(3, 6, 5).split(3, dim=1)[rank].requires_grad_()
    loss = contrast_loss(x, 2)
    loss.backward()
    results["contrast"] = (loss.detach(), x.grad)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of run_rank from both processes."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("case", ROWS)
def test_sinkhorn_over_ranks(ranks, case, extreme):
    parts = [results[f"sinkhorn {case} {extreme}"] for results in ranks]
    assert tuple(map(len, parts)) == ROWS[case]
    expected = sinkhorn_knopp(rank_inputs(case, extreme), 0.1)
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ROWS)
def test_centered_over_ranks(ranks, case):
    parts = [results[f"centered {case}"] for results in ranks]
    assert tuple(map(len, parts)) == ROWS[case]
    torch.testing.assert_close(torch.cat(parts).double(), plain_centered(*rows_at(case)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("B", [1, 4])
def test_koleo_over_ranks(ranks, B):
    """The mean over ranks is the loss of all rows. Averaged over ranks, as data parallel training does, so are the
    gradients."""
    x = randn(2 * B, 5, seed=B).requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    values, gradients = zip(*(results[f"koleo {B}"] for results in ranks))
    torch.testing.assert_close(sum(values) / 2, loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(gradients) / 2, x.grad, rtol=1e-4, atol=1e-6)


def test_contrast_over_ranks(ranks):
    """The mean of the ranks' losses is the loss of all recordings; gradients summed over ranks are twice its own."""
    x = randn(3, 6, 5).requires_grad_()
    whole = contrast_loss(x, 2)
    whole.backward()
    losses, gradients = zip(*(results["contrast"] for results in ranks))
    torch.testing.assert_close(sum(losses) / 2, whole.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.cat(gradients, dim=1) / 2, x.grad, rtol=1e-5, atol=1e-7)
