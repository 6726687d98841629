"""The DINOv3 objective: heads, Sinkhorn-Knopp targets, losses and the EMA teacher.

A student sees every view, a teacher only the global ones; the teacher is the student's moving average and gets no
gradient.
    DINO      the CLS tokens of two views of a recording should fall on the same prototypes (Caron et al. 2021)
    iBOT      a masked patch should fall on the prototypes of the patch that the teacher saw there (Zhou et al. 2022)
    Leads     a patch of a view of few leads should fall on the prototypes of the teacher's patch, seen among all leads
    Wave      a patch should predict the ECG of another one of its lead, a given time before or after; a masked its own
    Context   the same for what all blocks of the teacher say of that patch (Baevski et al. 2022, data2vec), also from
              patches of views of few leads, of themselves
    Sinkhorn  the teacher's assignments use every prototype equally, so not all recordings share one (SwAV 2020, DINOv2)
    KoLeo     global features of different recordings keep a distance (Sablayrolles et al. 2019)
    Contrast  a view is nearer to its own recording than to others (InfoNCE); a short run needs it
    Gram      similarities between patches stay those of an earlier teacher (Simeoni et al. 2025)

Everything here is computed in fp32 and stays finite for any finite logits. Where a process group exists, Sinkhorn sums,
means at a lead and time and KoLeo neighbours are over all ranks, and a loss is this rank's share: the mean of the
ranks' values is the loss of the whole batch, if every rank holds the same number of rows (sinkhorn_knopp and ibot_loss
do not need that).

Shapes: S student views, T teacher views, B recordings, K prototypes, M patches, R rows, N patches, D width.
"""
import copy
import itertools
import math
from collections import defaultdict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

# DINOv3's. The weights of the other terms are in train.RECIPES.
DINO_WEIGHT, KOLEO_WEIGHT, IBOT_WEIGHT, GRAM_WEIGHT = 1.0, 0.1, 1.0, 2.0
STUDENT_TEMPERATURE = 0.1
# Norm of a prototype at the start; later it is free. DINOv3's 0.02 per weight gives a norm of 0.3: the targets are then
# almost uniform for thousands of steps, and a short run does not have so many.
PROTOTYPE_NORM = 1.0
OFFSET_STD = 0.5                 # standard deviation of the vectors of PatchHead at the start
KOLEO_EPS = 1e-8
CONTRAST_TEMPERATURE = 0.15      # of InfoNCE; .08 is worse, .3 no better (LOG.md)
LOWEST = -1e30                   # a logit this far below the best has no effect; keeps -inf out of sums and products

COLLAPSED_RANK = 2.0             # effective rank of a batch's global features within equal lead sets
SHARED_AT_LEAST = 4              # recordings beyond one per lead set; the rank within lead sets cannot exceed this
SAME_FEATURES = 1e-3             # of the features' root mean square: with a smaller difference they count as equal
COLLAPSED_ENTROPY = 0.3          # of the mean prediction, as a share of ln K; 0.95 in a good run
UNIFORM_ENTROPY = 0.98           # of the targets after the warm-up, as a share of ln K; 0.6 in a good run
ONE_HOT_ENTROPY = 0.1            # of the patch targets after the warm-up, as a share of ln K


# ---- heads and teacher ----------------------------------------------------------------------------------------------
class DINOHead(nn.Module):
    """Three-layer MLP to a bottleneck on the unit sphere, then bias-free prototypes, without weight norm (DINOv3):
    x (..., in_dim) -> logits (..., num_prototypes), and with_bottleneck also the points on the sphere. position: see
    centered()."""

    def __init__(self, in_dim, hidden_dim, bottleneck_dim, num_prototypes, init_seed=0):
        super().__init__()
        self.init_seed = init_seed
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
                                 nn.Linear(hidden_dim, bottleneck_dim))
        self.prototypes = nn.Linear(bottleneck_dim, num_prototypes, bias=False)
        if not self.prototypes.weight.is_meta:
            self.init_weights()

    def first_weights(self):
        """Yield every parameter with its first value, a CPU tensor, one by one; init_seed decides the values."""
        generator = torch.Generator().manual_seed(self.init_seed)
        for layer in self.mlp[::2]:
            yield layer.weight, nn.init.trunc_normal_(torch.empty(layer.weight.shape, device="cpu"), std=0.02, a=-0.04,
                                                      b=0.04, generator=generator)
            yield layer.bias, torch.zeros(layer.bias.shape, device="cpu")
        weight = self.prototypes.weight
        yield weight, torch.empty(weight.shape, device="cpu").normal_(
            std=PROTOTYPE_NORM * self.prototypes.in_features ** -0.5, generator=generator)

    @torch.no_grad()
    def init_weights(self):
        for parameter, value in self.first_weights():
            parameter.copy_(value)

    def forward(self, x, with_bottleneck=False, position=None, positions=0):
        x = self.mlp(x)
        x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        if position is not None:
            x = centered(x, position, positions)
        return (self.prototypes(x), x) if with_bottleneck else self.prototypes(x)


class PatchHead(nn.Module):
    """Predicts what a patch is like (M, out_dim) from the feature of another, x (M, D); offset (M,) in [0, offsets):
    which."""

    def __init__(self, in_dim, hidden_dim, offsets, out_dim, init_seed=0):
        super().__init__()
        self.init_seed, self.offset_vectors = init_seed, nn.Embedding(offsets, hidden_dim)
        self.first = nn.Linear(in_dim, hidden_dim)
        self.rest = nn.Sequential(nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
                                  nn.Linear(hidden_dim, out_dim))
        if not self.first.weight.is_meta:
            for parameter, value in self.first_weights():
                parameter.data.copy_(value)

    def first_weights(self):
        """As in DINOHead."""
        generator = torch.Generator().manual_seed(self.init_seed)
        for layer in (self.first, *self.rest[1::2]):
            yield layer.weight, torch.empty(layer.weight.shape, device="cpu").normal_(
                std=layer.in_features ** -0.5, generator=generator)
            yield layer.bias, torch.zeros(layer.bias.shape, device="cpu")
        weight = self.offset_vectors.weight
        yield weight, torch.empty(weight.shape, device="cpu").normal_(std=OFFSET_STD, generator=generator)

    def forward(self, x, offset):
        return self.rest(self.first(x) + self.offset_vectors(offset))


def build_networks(encoder, hidden_dim, bottleneck_dim, cls_prototypes, patch_prototypes, offsets=0):
    """Student and teacher, each a ModuleDict of encoder, dino_head (of [CLS, mean patch]) and ibot_head (of patches);
    the teacher is a frozen copy. With `offsets` the student has wave_head and context_head too, as its last parts, also
    if one of them has weight 0. They are on the device of the encoder, which may be meta."""
    seed, width = encoder.config["init_seed"], encoder.width
    with encoder.cls_token.device:
        student = nn.ModuleDict(dict(
            encoder=encoder, dino_head=DINOHead(2 * width, hidden_dim, bottleneck_dim, cls_prototypes, seed + 1),
            ibot_head=DINOHead(width, hidden_dim, bottleneck_dim, patch_prototypes, seed + 2)))
        teacher = copy.deepcopy(student).requires_grad_(False).eval()
        if offsets:
            student["wave_head"] = PatchHead(width, hidden_dim, offsets, encoder.patch_samples, seed + 3)
            student["context_head"] = PatchHead(width, hidden_dim, offsets, width, seed + 4)
    return student, teacher


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student, on the shards that this rank holds."""
    averages = list(teacher.parameters())
    get_ema_multi_avg_fn(momentum)(averages, list(student.parameters())[:len(averages)], None)    # without PatchHeads


# ---- collectives, which do nothing on one process -------------------------------------------------------------------
def distributed():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def num_ranks():
    return dist.get_world_size() if distributed() else 1


def reduce_(tensor, op=None):
    """All-reduce in place (sum unless `op` says otherwise)."""
    if distributed():
        dist.all_reduce(tensor, op=op or dist.ReduceOp.SUM)
    return tensor


class GatherRows(torch.autograd.Function):
    """x (B, D) of every rank, concatenated in rank order; the gradient of this rank's rows is summed over all ranks.

    torch.distributed.nn.functional.all_gather does the same at the same speed, but it is deprecated from PyTorch 2.13
    on, and its replacement is not public in 2.7.
    """

    @staticmethod
    def forward(ctx, x):
        gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, x.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient):
        return reduce_(gradient.contiguous()).chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(x):
    """Rows (B, D) of all ranks, with gradient, and the index of this rank's first row among them."""
    return (GatherRows.apply(x), dist.get_rank() * len(x)) if distributed() else (x, 0)


# ---- targets --------------------------------------------------------------------------------------------------------
def full_precision(x):
    """Context without autocast, which would compute matrix products of fp32 values in bf16."""
    return torch.autocast(x.device.type, enabled=False)


@torch.no_grad()
def centered(x, position, positions):
    """x (M, D) less the mean of the rows of all ranks at the same position (M,) in [0, positions), a lead and a time of
    a lead group: targets must not tell what every recording has in common there, because the student knows lead and
    time without looking at the ECG."""
    at = F.one_hot(position, positions).to(torch.promote_types(x.dtype, torch.float32))                # (M, positions)
    with full_precision(x):
        sums = reduce_(at.T @ torch.cat((x.to(at.dtype), torch.ones_like(at[:, :1])), dim=1))
        return (x - (sums[:, :-1] / sums[:, -1:].clamp(min=1))[position]).to(x.dtype)


@torch.no_grad()
def sinkhorn_knopp(logits, temperature, iterations=3):
    """Teacher probabilities (R, K): rows sum to 1, and prototypes share all rows of all ranks about equally.

    It starts from exp(logits / temperature). Each iteration scales every prototype (column) to an equal mass and then
    every row to 1. Ranks may hold different numbers of rows R. `temperature` may be a float or a tensor.
    """
    logits = logits.float()
    R, K = logits.shape
    # A constant of a column cancels. Without it, and with the largest number of a row in of_row, nothing overflows, and
    # every column and every row of q has an entry of 1: what exp() rounds to 0 has no weight.
    top = logits.amax(dim=0) if R else logits.new_full((K,), torch.finfo(torch.float32).min)
    log_q = (logits - reduce_(top, dist.ReduceOp.MAX)).clamp(min=LOWEST) / temperature
    row_top = log_q.amax(dim=1, keepdim=True)
    q, of_row = (log_q - row_top).exp(), row_top.exp()[:, 0]
    with full_precision(q):
        for _ in range(iterations):
            of_column = 1 / reduce_(of_row @ q)
            of_row = 1 / (q @ of_column)
    return of_row[:, None] * q * of_column


# ---- losses ---------------------------------------------------------------------------------------------------------
def student_log_probs(logits):
    """log softmax(logits / STUDENT_TEMPERATURE) over the last axis, in fp32, finite for any finite logits."""
    return F.log_softmax(logits.float().clamp(LOWEST, -LOWEST) / STUDENT_TEMPERATURE, dim=-1)


def dino_loss(student_logits, teacher_probs, ignore_diagonal=False):
    """Mean cross-entropy between views: student_logits (S, B, K), teacher_probs (T, B, K) -> scalar.

    for s, t, b: - sum_k teacher[t, b, k] * log_softmax(student[s, b] / 0.1)[k], averaged over all triples, with
    ignore_diagonal over those with s != t (a global view is not compared with itself).
    """
    S, B, _ = student_logits.shape
    T = teacher_probs.shape[0]
    with full_precision(student_logits):
        pairs = torch.einsum("sbk,tbk->st", student_log_probs(student_logits), teacher_probs.float())  # (S, T)
    count = S * T
    if ignore_diagonal:
        pairs = pairs.clone().fill_diagonal_(0.0)
        count -= min(S, T)
    return -pairs.sum() / (B * count)


def ibot_loss(student_logits, teacher_probs, weights, num_crops):
    """Cross-entropy of masked patches: logits and probs (M, K), weights (M,) = 1 / masked patches of that crop
    -> scalar.

    sum_m weights[m] * CE_m / num_crops; num_crops counts all global crops of this rank, masked or not.
    """
    cross_entropy = -(teacher_probs.float() * student_log_probs(student_logits)).sum(dim=-1)
    return (cross_entropy * weights.float()).sum() / num_crops


def koleo_loss(x):
    """- mean_i log(distance of x_i to its nearest other row) on the unit sphere; x (B, D), neighbours from all ranks.

    KOLEO_EPS is added to each component of a difference, and again under the logarithm. With fewer than two rows in all
    there is no neighbour, and the loss is 0.
    """
    with full_precision(x):
        x = F.normalize(x.float(), dim=-1, eps=KOLEO_EPS)
        everyone, first = gather_rows(x)
        if len(everyone) < 2:
            return x.sum() * 0.0
        rows = torch.arange(len(x), device=x.device)
        with torch.no_grad():
            similarity = x @ everyone.T
            similarity[rows, first + rows] = -2.0                              # below any cosine: not its own neighbour
            nearest = similarity.argmax(dim=1)
        distance = F.pairwise_distance(x, everyone[nearest], eps=KOLEO_EPS)
        return -(distance + KOLEO_EPS).log().mean()


def contrast_loss(x, num_anchors):
    """Pulls every view of a recording nearer to its global views than to those of other recordings, of all ranks
    (InfoNCE, van den Oord et al. 2018); x (V, B, D), of which the first num_anchors views are the global ones.

    for v, t, b with v != t: - log softmax_c(cos(x[v, b], x[t, c]) / CONTRAST_TEMPERATURE)[c = b], averaged.
    """
    with full_precision(x):
        x = F.normalize(x.float(), dim=-1, eps=KOLEO_EPS)
        V, B, D = x.shape
        anchors, first = gather_rows(x[:num_anchors].transpose(0, 1).reshape(B, num_anchors * D))
        cosine = torch.einsum("vbd,ctd->vtbc", x, anchors.unflatten(1, (num_anchors, D)))
        rows = torch.arange(B, device=x.device)
        log_probs = (cosine / CONTRAST_TEMPERATURE).log_softmax(dim=-1)[:, :, rows, first + rows]      # (V, T, B)
        pairs = -log_probs.mean(dim=-1)                                                                # (V, T)
        return pairs.masked_fill(torch.eye(V, num_anchors, dtype=torch.bool, device=x.device), 0.0).sum() / (
            num_anchors * max(1, V - 1))


def gram_loss(student, teacher):
    """Mean squared difference of the patches' cosine matrices: student and teacher (B, N, D) -> scalar."""
    with full_precision(student):
        student, teacher = (F.normalize(x.float(), dim=-1) for x in (student, teacher))
        return F.mse_loss(student @ student.transpose(1, 2), teacher @ teacher.transpose(1, 2))


# ---- the objective on one batch -------------------------------------------------------------------------------------
def group_features(group, target, context, anchor, views):
    """What the losses need from a lead group: global features, view-major (S, B, 2D), and the patches of the student
    (M, D) and of the teacher at the same `place` (M,), lead and time: masked ones, then those that views of few leads
    are asked for. With context (T*B, L, N, D) also this, (T*B*L*N, D), less its mean over the recordings of all ranks
    at the same lead and time, which can be told without looking at the ECG.
    target and anchor: Features of the clean global views, from teacher and Gram teacher; views: Features of all noisy
    views, from the student."""
    B, asked, place = group["recordings"], group["asked"], group["place"]
    patches = views[0].patches
    found = patches.flatten(0, 2)[place]
    if asked is not None:
        found = torch.cat((found, views[-1].patches.flatten(0, 2)[asked["token"]]))
        place = torch.cat((place, asked["target"]))
    if context is not None:
        context = context.sub_(reduce_(context.mean(0)) / num_ranks()).flatten(0, 2)
    return dict(cls=[v.pooled().unflatten(0, (-1, B)) for v in views], target_cls=target.pooled().unflatten(0, (-1, B)),
                patches=found, target_patches=target.patches.flatten(0, 2)[place], all_patches=patches,
                place=place, context=context,
                position=place % target.patches[0, ..., 0].numel(), positions=target.patches[0, ..., 0].numel(),
                gram=gram_loss(patches.flatten(1, 2), anchor.patches.flatten(1, 2)) if anchor is not None else None)


@torch.no_grad()
def group_targets(teacher, features, temperature, patch_temperature):
    """Teacher probabilities of each lead group: of the global views (T, B, K), and of the patches (M, K). Sinkhorn runs
    within a group."""
    cls = [f["target_cls"] for f in features]
    logits = teacher["dino_head"](torch.cat([x.flatten(0, 1) for x in cls])).split([x[..., 0].numel() for x in cls])
    first = [0, *itertools.accumulate(f["positions"] for f in features)]
    patch_logits = teacher["ibot_head"](
        torch.cat([f["target_patches"] for f in features]),
        position=torch.cat([f["position"] + n for f, n in zip(features, first)]), positions=first[-1])
    return ([sinkhorn_knopp(z, temperature).unflatten(0, x.shape[:2]) for z, x in zip(logits, cls)],
            [sinkhorn_knopp(z, patch_temperature) for z in patch_logits.split([len(f["position"]) for f in features])])


def group_parts(group, f, target, patch_target, logits, points, patch_logits, contrast):
    """Losses of one lead group: dict of scalars. f: its group_features; target (T, B, K) and patch_target (M, K): the
    teacher's probabilities; logits (S, B, K), points (S, B, E) on the sphere and patch_logits (M, K): the student's.
    contrast: whether to compute it."""
    (T, B, _), S, masked = target.shape, len(logits), len(group["place"])
    parts = dict(dino_global=dino_loss(logits[:T], target, ignore_diagonal=True),
                 dino_local=dino_loss(logits[T:], target),
                 ibot=ibot_loss(patch_logits[:masked], patch_target[:masked], group["weights"], T * B),
                 koleo=sum(koleo_loss(view) for view in f["cls"][0]))
    # Every (student view, teacher view) pair counts the same.
    share = (T - 1) / (S - 1)                    # of the pairs of two global views
    parts["dino"] = share * parts["dino_global"] + (1 - share) * parts["dino_local"]
    if contrast:
        parts["contrast"] = contrast_loss(points, T)
    if group["asked"] is not None:
        parts["leads"] = ibot_loss(patch_logits[masked:], patch_target[masked:], group["asked"]["weight"],
                                   f["cls"][-1][..., 0].numel())
    if f["gram"] is not None:
        parts["gram"] = f["gram"]
    return parts


def patch_losses(student, encoder, groups, features):
    """Mean squared errors of what is predicted of patches: {wave, context} of each lead group. A patch of a noisy
    global view tells of another one of its lead (`near` of augment.cut_views), a masked one of itself, and a patch of a
    view of few leads the context of itself; each view has the same weight. The wave is the clean ECG as the front end
    of the encoder has it, the context that of group_features."""
    near = [g["near"] for g in groups]
    tokens = [torch.cat((f["all_patches"].flatten(0, 2)[n["token"]], f["patches"])) for n, f in zip(near, features)]
    offsets = torch.cat([F.pad(n["offset"], (0, len(f["place"]))) for n, f in zip(near, features)])
    patches, losses = torch.cat(tokens), []
    told = [student[name](patches, offsets).split([len(x) for x in tokens]) for name in ("wave_head", "context_head")]
    for n, g, f, *mine in zip(near, groups, features, *told):
        place, counts = torch.cat((n["target"], f["place"])), [len(n["token"]), len(g["place"])]
        with torch.no_grad():
            actual = encoder.front_end(g["views"][0][1]).flatten(0, 2)[place], f["context"][place]
        wave, context = ((x.float() - y).square().mean(-1).split([*counts, len(x) - sum(counts)])
                         for x, y in zip(mine, actual))
        losses.append({name: others.mean() + (masked * g["weights"]).sum() / len(g["masks"])
                       for name, (others, masked, _) in dict(wave=wave, context=context).items()})
        if g["asked"] is not None:
            asked = (context[2] * g["asked"]["weight"]).sum() / f["cls"][-1][..., 0].numel()
            losses[-1]["context"] = losses[-1]["context"] + asked
    return losses


def objective(student, teacher, gram_teacher, groups, temperature, patch_temperature, weights):
    """Loss of a batch (lead groups of augment.cut_views), its parts and the entropy of its targets (dict of scalars),
    the teacher's global features (T, B, 2D) and the student's logits (rows, K). Temperatures of the targets of global
    features and of patches; weights of the terms contrast, leads, wave, context and gram.

    Everything that compares recordings does so within a lead group, where all global views show the same leads: an
    encoder that looks at lead names alone gains nothing.
    """
    clean = [(signal, named, None) for g in groups for _, signal, _, named in g["views"][:1]]
    noisy = [(signal, ids, mask) for g in groups
             for (signal, _, ids, _), mask in zip(g["views"], (g["masks"], None, None))]
    with torch.no_grad():
        context = "context_head" in student
        targets = teacher["encoder"].encode(clean, context=context)
        targets = targets if context else [(target, None) for target in targets]
        anchors = gram_teacher.encode(clean) if gram_teacher is not None else [None] * len(groups)
    views = iter(student["encoder"].encode(noisy))
    features = [group_features(g, *target, anchor, [next(views) for _ in g["views"]])
                for g, target, anchor in zip(groups, targets, anchors)]
    probs, patch_probs = group_targets(teacher, features, temperature, patch_temperature)
    cls = [torch.cat(f["cls"]) for f in features]                                     # (S, B, 2D) each
    logits, points = student["dino_head"](torch.cat([x.flatten(0, 1) for x in cls]), with_bottleneck=True)
    patch_logits = student["ibot_head"](torch.cat([f["patches"] for f in features]))
    by_group = [[z.unflatten(0, x.shape[:2]) for z, x in zip(rows.split([x[..., 0].numel() for x in cls]), cls)]
                for rows in (logits, points)]
    patch_logits = patch_logits.split([len(p) for p in patch_probs])
    found = [group_parts(g, *rest, contrast=bool(weights["contrast"]))
             for g, *rest in zip(groups, features, probs, patch_probs, *by_group, patch_logits)]
    if context:
        for mine, told in zip(found, patch_losses(student, teacher["encoder"], groups, features)):
            mine |= told
    parts, B = defaultdict(float), sum(g["recordings"] for g in groups)
    for g, mine in zip(groups, found):
        for name, value in mine.items():
            parts[name] = parts[name] + g["recordings"] / B * value
    loss = DINO_WEIGHT * parts.pop("dino") + KOLEO_WEIGHT * parts["koleo"] + IBOT_WEIGHT * parts["ibot"]
    for name in ("contrast", "leads", "wave", "context", "gram"):
        loss = loss + weights[name] * parts[name] if name in parts else loss
    parts["target_entropy"] = torch.special.entr(torch.cat([p.flatten(0, 1) for p in probs])).sum(-1).mean()
    # Ranks hold different numbers of masked patches: weighted, so that the mean of the ranks is the mean of all.
    of_patches = torch.special.entr(torch.cat(patch_probs)).sum(-1)
    parts["patch_target_entropy"] = of_patches.sum() / (reduce_(of_patches.new_full((), len(of_patches))) / num_ranks())
    return loss, dict(parts), torch.cat([f["target_cls"] for f in features], dim=1), logits


# ---- is a run learning? ---------------------------------------------------------------------------------------------
@torch.no_grad()
def health(features, lead_sets, mean_prediction):
    """Signs of collapse that the loss does not show: dict of 0-d tensors cls_std, cls_rank, prediction_entropy.

    features (R, 2D): the teacher's, of the recordings of all ranks. lead_sets (R, len(LEADS)) int: how often a
    recording shows each lead. mean_prediction (K,): the student's mean probability of each prototype.

    cls_rank is the effective rank of the features among recordings with the same leads (among all, if too few have the
    same): the features of an encoder that reads lead names and ignores the ECG differ only between lead sets.
    """
    x = torch.nan_to_num(features).double()
    _, which, size = torch.unique(lead_sets, dim=0, return_inverse=True, return_counts=True)
    if len(x) - len(size) < SHARED_AT_LEAST:
        which, size = torch.zeros_like(which), torch.full_like(size[:1], len(x))
    mean = x.new_zeros(len(size), x.shape[1]).index_add_(0, which, x) / size[:, None]
    within = x - mean[which]
    alike = within.square().mean() <= SAME_FEATURES ** 2 * x.square().mean()       # rounding noise has a high rank
    return dict(cls_std=x.std(0).mean().float(),
                cls_rank=torch.where(alike, 1.0, effective_rank(within)).float(),
                prediction_entropy=-(mean_prediction * mean_prediction.clamp(min=1e-12).log()).sum())


def effective_rank(x):
    """exp of the entropy of the singular values of x (R, F), fp64, as shares of their sum (Roy and Vetterli 2007).

    Roots of the eigenvalues of x x' or x' x (the smaller), in fp64, because the root of a rounding error is not small.
    """
    square = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(square).clamp(min=0).sqrt()
    share = values / values.sum().clamp(min=1e-12)
    return (-(share * share.clamp(min=1e-12).log()).sum()).exp()


def diagnose(row, warm):
    """Warnings about the numbers of a logged step (dict): {kind: sentence}, empty in a run that learns. A value that is
    absent, None or NaN gives no warning. warm: whether the warm-up is over."""
    names = ("cls_rank", "prediction_entropy", "target_entropy", "ln_k", "patch_target_entropy", "ln_patch_k")
    rank, prediction, target, ln_k, patch_target, ln_patch_k = (
        math.nan if row.get(n) is None else row[n] for n in names)
    signs = {
        "collapse of features": (rank < COLLAPSED_RANK, (
            f"the global features differ along only {rank:.1f} directions among recordings with the same leads: the "
            "encoder ignores the ECG. Try a smaller --lr, a larger KOLEO_WEIGHT, or more patients")),
        "collapse of predictions": (prediction < COLLAPSED_ENTROPY * ln_k, (
            f"the student uses only a few of the prototypes (entropy {prediction:.2f} of {ln_k:.2f}). "
            "Try a smaller --lr, or fewer --prototypes")),
        "uniform targets": (warm and target > UNIFORM_ENTROPY * ln_k, (
            f"the teacher finds all prototypes equally likely (entropy {target:.2f} of {ln_k:.2f}), which teaches "
            "nothing. Try a lower temperature in RECIPES, or fewer --prototypes")),
        "one-hot patch targets": (warm and patch_target < ONE_HOT_ENTROPY * ln_patch_k, (
            f"the teacher gives each patch only one prototype (entropy {patch_target:.2f} of {ln_patch_k:.2f}), so the "
            "targets do not say which patches are alike. Try a higher patch_temperature in RECIPES, or fewer "
            "--prototypes"))}
    return {kind: sentence for kind, (found, sentence) in signs.items() if found}
