# Copyright (c) The mokd_det authors.
"""Training classifiers, by equality with what it must equal."""

import json
import math

import mokd_det.compat  # noqa: F401  (first: the other processes have no conftest)
import pytest
import torch
import torchvision
from detectron2.data import DatasetCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.utils.env import seed_all_rng

from mokd_det.config import load_config
from mokd_det.data import register_datasets, schedule_in_iterations
from mokd_det.data.classification import Batch, build_test_loader, build_train_loader
from mokd_det.engine import DistillationTrainer, build_trainer, validate
from mokd_det.engine.optimizer import build_optimizer
from mokd_det.evaluation import ClassificationEvaluator
from mokd_det.modeling import Classifier
from mokd_det.tasks import task_of

from ..conftest import DIGIT_OPTS, ROOT
from .helpers import balanced_steps, on_two_ranks, train, train_and_stop

MIXED = ["INPUT.CLASSIFICATION.MIXUP", 0.8, "INPUT.CLASSIFICATION.CUTMIX", 1.0]
SMALL = ["MOKD.FEATURES.DIM", 32, "INPUT.CLASSIFICATION.SIZE_TRAIN", 32]
OFF = ["MOKD.ENABLED", False]
STATISTICS = ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2]


def slow(opts):
    return pytest.param(opts, marks=pytest.mark.slow)


def saved(cfg, entry="model"):
    return torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)[entry]


def assert_equal_states(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("mixed", [[], MIXED], ids=["labels", "mixed"])
def test_without_a_teacher_it_is_a_plain_torch_loop_bit_for_bit(make_digits_cfg, mixed):
    opts = [*OFF, *mixed, "SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 0.004]
    opts += ["SOLVER.WEIGHT_DECAY", 0.05, "SOLVER.WEIGHT_DECAY_NORM", 0.0]
    opts += ["SOLVER.WEIGHT_DECAY_BIAS", None, "MODEL.CLASSIFIER.LABEL_SMOOTHING", 0.1]
    cfg = make_digits_cfg(opts)
    trainer = train(cfg)

    seed_all_rng(cfg.SEED)
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=10).train()
    norms = {
        p
        for m in network.modules()
        if isinstance(m, torch.nn.BatchNorm2d)
        for p in m.parameters(recurse=False)
    }
    decays = [p for p in network.parameters() if p not in norms]
    optimizer = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.05}, {"params": list(norms), "weight_decay": 0.0}],
        lr=cfg.SOLVER.BASE_LR,
    )
    loader = build_train_loader(cfg)
    loader.seed = trainer._trainer.seed
    mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1)
    std = torch.tensor(cfg.MODEL.PIXEL_STD).view(3, 1, 1)
    for iteration, batch in zip(range(3), loader):
        for group in optimizer.param_groups:
            group["lr"] = cfg.SOLVER.BASE_LR * 0.5 * (1 + math.cos(math.pi * iteration / 3))
        logits = network((batch.images - mean) / std)
        loss = torch.nn.functional.cross_entropy(logits, batch.targets, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_equal_states(saved(cfg), network.state_dict())


def test_the_checkpoint_is_torchvisions_and_has_no_teacher(make_digits_cfg):
    cfg = make_digits_cfg(SMALL)
    train(cfg)
    checkpoint = torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)
    assert set(checkpoint) == {"model", "objectives", "trainer", "iteration", "run"}
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=10)
    network.load_state_dict(checkpoint["model"], strict=True)
    batch = next(iter(build_test_loader(cfg, "tests_digits_val")))
    cfg.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}/model_final.pth"
    model = task_of(cfg).load_trained(cfg)
    with torch.no_grad():
        expected = network.eval()(model.preprocess(batch.images))
        assert torch.equal(model(batch), expected)


@pytest.mark.parametrize(
    "opts",
    [
        [],
        slow([*MIXED, "DATALOADER.REPEATED_AUGMENTATION", 2]),
        slow(["SOLVER.EMA_DECAY", 0.9, "SOLVER.OPTIMIZER", "AdamW"]),
        slow(["MOKD.BALANCING.RULE", "famo", "MODEL.CLASSIFIER.NAME", "mobilenet_v3_small"]),
        slow(["DATALOADER.NUM_WORKERS", 2]),
        slow(["MOKD.OBJECTIVES", ["teacher_head", "logits"], "MOKD.FEATURES.DIM", 0]),
        slow([*STATISTICS, "TEST.EVAL_PERIOD", 1, *MIXED]),
    ],
    ids=["plain", "mixed", "average", "famo", "workers", "teacher_head", "statistics"],
)
def test_resumed_equals_uninterrupted(make_digits_cfg, opts):
    opts = [*SMALL, *opts, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2]
    whole = make_digits_cfg(opts, "whole")
    train(whole)

    cfg = make_digits_cfg(opts, "stopped")
    train_and_stop(cfg, 2)
    cfg.SEED = 12345  # the checkpoint's seed counts
    assert train(cfg, resume=True).start_iter == 2
    assert_equal_states(saved(whole), saved(cfg))


@pytest.mark.parametrize("opts", [[], OFF], ids=["distilled", "alone"])
def test_statistics_for_evaluation_are_those_of_the_batches(make_digits_cfg, opts):
    """The rest of the student is trained as without them."""
    opts = [*SMALL, *opts, "SOLVER.MAX_ITER", 2, "MODEL.CLASSIFIER.NAME", "mobilenet_v3_small"]
    plain = make_digits_cfg(opts, "plain")
    train(plain)
    cfg = make_digits_cfg([*opts, *STATISTICS], "precise")
    trainer = train(cfg)
    precise, moving = saved(cfg), saved(plain)
    for name in precise:
        same = not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(precise[name], moving[name]) or not same, name
    first = "network.features.0.1.running_mean"
    seen = []
    student = trainer._trainer.inner.student
    hook = student.network.features[0][0].register_forward_hook(
        lambda module, inputs, output: seen.append(output.mean(dim=(0, 2, 3)))
    )
    loader = trainer._build_other_loader()
    with torch.no_grad():
        for _, batch in zip(range(2), loader):
            student(batch)
    hook.remove()
    assert torch.allclose(precise[first.removeprefix("network.")], sum(seen) / 2, atol=1e-5)


def test_without_the_option_nothing_is_said_of_statistics(make_digits_cfg, caplog):
    cfg = make_digits_cfg([*OFF, "MODEL.CLASSIFIER.NAME", "vgg11"])  # without BatchNorm
    with caplog.at_level("INFO", "detectron2"):
        build_trainer(cfg)
    assert "PreciseBN" not in caplog.text


def test_statistics_exclude_a_running_mean_of_the_weights(make_digits_cfg):
    cfg = make_digits_cfg([*STATISTICS, "SOLVER.EMA_DECAY", 0.9])
    with pytest.raises(ValueError, match="SOLVER.EMA_DECAY 0.9 exclude each other"):
        validate(cfg)


def test_a_resumed_epoch_goes_on_where_it_stopped(make_digits_cfg):
    """The images of an epoch are each seen once, though the run stopped in its middle."""
    cfg = make_digits_cfg([*OFF, "SOLVER.IMS_PER_BATCH", 10])
    register_datasets(cfg)
    seen = []
    for start, count in ((0, 2), (2, 4)):
        loader = build_train_loader(cfg)
        loader.seed, loader.start = 3, start
        seen += [name for _, batch in zip(range(count), loader) for name in batch.names]
    assert len(seen) == len(set(seen)) == 60


@pytest.mark.slow
@pytest.mark.parametrize(
    "opts",
    [
        ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16"],
        ["SOLVER.MICRO_BATCHES", 2],
        ["SOLVER.EMA_DECAY", 0.99],
        ["MOKD.BALANCING.MEASURE_AT", "parameters"],
        ["MOKD.BALANCING.MEASURE_AT", "parameters", "MOKD.BALANCING.LAYERS", ["conv5"]],
        ["MOKD.BALANCING.MEASURE_AT", "parameters", "SOLVER.MICRO_BATCHES", 2],
        ["MOKD.BALANCING.RULE", "famo", "MOKD.BALANCING.RESCALE", "sum"],
        ["MOKD.TEACHER.IMAGE_SIZE", 48],
        ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.OPTIMIZER", "AdamW"],
    ],
    ids=lambda opts: " ".join(map(str, opts[:2])),
)
def test_options_of_the_step_suit_classifiers(make_digits_cfg, opts):
    cfg = make_digits_cfg([*SMALL, *opts, "SOLVER.MAX_ITER", 1])  # logs are medians over steps
    trainer = train(cfg)
    with open(f"{cfg.OUTPUT_DIR}/metrics.json") as f:
        scalars = {k: v for line in f for k, v in json.loads(line).items()}
    parts = [scalars[name] for name in ("loss_cls", "loss_features", "loss_logits")]
    assert scalars["total_loss"] == pytest.approx(sum(parts), rel=1e-3)
    place = trainer._trainer.boundary.measured_at
    assert f"balance/{place}/cosine_logits" in scalars
    assert set(trainer._last_eval_results["classification"]) == {
        *("top1", "top5", "images", "skipped"),
    }


@pytest.mark.slow
def test_accumulation_is_the_big_batch_where_nothing_depends_on_it(make_digits_cfg):
    opts = ["MOKD.BALANCING.MEASURE_AT", "parameters", "MODEL.CLASSIFIER.NAME", "squeezenet1_1"]
    opts += ["MODEL.CLASSIFIER.OPTIONS", "{dropout: 0.0}"]
    opts += ["MOKD.OBJECTIVES", ["logits"], "MOKD.FEATURES.DIM", 0]
    opts += ["INPUT.CLASSIFICATION.SIZE_TRAIN", 48, "SOLVER.MAX_ITER", 1, "SOLVER.BASE_LR", 0.01]
    opts += ["SOLVER.OPTIMIZER", "SGD"]
    whole, parts = make_digits_cfg(opts, "whole"), make_digits_cfg(opts, "parts")
    parts.SOLVER.MICRO_BATCHES = 4
    train(whole), train(parts)
    for key, value in saved(whole).items():
        assert torch.allclose(value, saved(parts)[key], rtol=1e-4, atol=1e-5), key


def test_epochs_become_iterations(make_digits_cfg):
    opts = ["SOLVER.UNIT", "epoch", "SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_ITER", 10]
    opts += ["SOLVER.STEPS", (3, 9), "SOLVER.WARMUP_ITERS", 1, "SOLVER.CHECKPOINT_PERIOD", 2]
    cfg = make_digits_cfg([*opts, "TEST.EVAL_PERIOD", 5])
    register_datasets(cfg)
    found = schedule_in_iterations(cfg)
    # 60 images in batches of 8
    assert (found.SOLVER.MAX_ITER, found.SOLVER.STEPS) == (75, (23, 68))
    assert (found.SOLVER.WARMUP_ITERS, found.SOLVER.CHECKPOINT_PERIOD) == (8, 15)
    assert (found.TEST.EVAL_PERIOD, found.SOLVER.UNIT) == (38, "iteration")
    assert schedule_in_iterations(found) is found
    assert cfg.SOLVER.MAX_ITER == 10
    cfg.SOLVER.WARMUP_ITERS = 1000
    with pytest.raises(ValueError, match="WARMUP_ITERS 1000 .* of MAX_ITER 10 are epochs"):
        validate(cfg)


def test_epochs_of_detectors(make_cfg):
    opts = ["SOLVER.UNIT", "epoch", "SOLVER.MAX_ITER", 1, "SOLVER.CHECKPOINT_PERIOD", 1]
    cfg = make_cfg("faster_rcnn", [*opts, "TEST.EVAL_PERIOD", 0])
    assert train(cfg).max_iter == 3  # 6 tiles in batches of 2


def test_weight_decay_is_split_by_the_kind_of_parameter():
    opts = ["MODEL.CLASSIFIER.NAME", "vit_tiny_16", "MODEL.CLASSIFIER.OPTIONS", "{image_size: 32}"]
    opts += ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.WEIGHT_DECAY", 0.05]
    opts += ["SOLVER.WEIGHT_DECAY_NORM", 0.01, "SOLVER.WEIGHT_DECAY_BIAS", 0.0]
    cfg = load_config("configs/Digits/student_scratch.yaml", opts)
    model = Classifier(cfg)
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    network = model.network
    assert len(decay) == len(list(model.parameters()))
    assert decay[network.conv_proj.weight] == decay[network.heads.head.weight] == 0.05
    assert decay[network.conv_proj.bias] == decay[network.class_token] == 0
    assert decay[network.encoder.pos_embedding] == 0
    assert decay[network.encoder.ln.weight] == 0.01


def test_training_starts_from_weights_of_other_classes(make_digits_cfg, tmp_path):
    source = torchvision.models.shufflenet_v2_x0_5(num_classes=1000)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    cfg = make_digits_cfg([*OFF, "MODEL.CLASSIFIER.WEIGHTS", str(tmp_path / "w.pth")])
    model = DistillationTrainer.build_model(cfg)
    assert torch.equal(model.student.network.conv1[0].weight, source.conv1[0].weight)


def test_inheriting_uses_the_networks_own_names(make_digits_cfg):
    opts = ["MODEL.CLASSIFIER.NAME", "resnet34", "MOKD.INHERIT", ["layer1.0", "fc"]]
    trainer = build_trainer(make_digits_cfg([*SMALL, *opts]))
    trainer.resume_or_load(False)
    student, teacher = trainer.model.student.network, trainer.model.teacher.model.network
    assert torch.equal(student.fc.weight, teacher.fc.weight)
    assert torch.equal(student.layer1[0].conv1.weight, teacher.layer1[0].conv1.weight)
    assert not torch.equal(student.layer1[1].conv1.weight, teacher.layer1[1].conv1.weight)


# Two processes: the step of one on the joined batch. BatchNorm would see parts of it, so the
# student has none; squeezenet's dropout is off for the same reason.
RANK_CASES = {
    "features": ["MOKD.BALANCING.MEASURE_AT", "features"],
    "parameters": ["MOKD.BALANCING.MEASURE_AT", "parameters"],
    "min_norm": ["MOKD.BALANCING.MEASURE_AT", "features", "MOKD.BALANCING.RULE", "min_norm"],
    "teacher_head": [
        *("MOKD.OBJECTIVES", ["teacher_head", "logits"], "MOKD.BALANCING.RULE", "min_norm"),
    ],
}
RANK_OPTS = [
    *(*DIGIT_OPTS, "MODEL.CLASSIFIER.NAME", "squeezenet1_1", "SOLVER.BASE_LR", 0.005),
    *("SOLVER.OPTIMIZER", "SGD"),
    *("MODEL.CLASSIFIER.OPTIONS", "{dropout: 0.0}", "MOKD.FEATURES.DIM", 32),
]


def steps(opts, weights, rank=None):
    opts = [*RANK_OPTS, *opts, "MOKD.TEACHER.WEIGHTS", weights]
    cfg = load_config(str(ROOT / "configs/Digits/student_mokd.yaml"), opts)
    cfg.MOKD.TEACHER.CONFIG_FILE = str(ROOT / "configs/Digits/teacher.yaml")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (8, 3, 48, 48), generator=generator, dtype=torch.uint8)
    batch = Batch(images, torch.arange(8))
    batch = batch if rank is None else batch[4 * rank : 4 * rank + 4]
    seed_all_rng(rank or 0)
    decided, model = balanced_steps(cfg, batch)
    return decided, model.student.state_dict()


def evaluated():
    """Evaluation of the digits by a fixed rule, which is right for some of them."""
    cfg = load_config(
        str(ROOT / "configs/Digits/teacher.yaml"), [*DIGIT_OPTS, "TEST.BATCH_SIZE", 7]
    )
    register_datasets(cfg)

    def model(batch):
        scores = torch.nn.functional.one_hot(batch.targets, 10).float()
        wrong = torch.tensor([int(name.split("#")[1]) % 3 == 0 for name in batch.names])
        scores[wrong] = scores[wrong].roll(1, 1) + 0.1 * scores[wrong]
        return scores

    loader = build_test_loader(cfg, "tests_digits_val")
    return inference_on_dataset(model, loader, ClassificationEvaluator("tests_digits_val"))


def all_cases(rank, weights):
    results = {name: steps(opts, weights, rank) for name, opts in RANK_CASES.items()}
    return {**results, "evaluation": evaluated()}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, digits_teacher_weights):
    return on_two_ranks(all_cases, tmp_path_factory.mktemp("ranks"), digits_teacher_weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", RANK_CASES)
def test_two_ranks_equal_one(two_ranks, digits_teacher_weights, name):
    weights, state = steps(RANK_CASES[name], digits_teacher_weights)
    first, second = (results[name] for results in two_ranks)
    assert torch.equal(first[0], second[0])
    assert torch.allclose(first[0], weights, rtol=1e-3, atol=1e-6)
    for key, value in state.items():
        assert torch.equal(first[1][key], second[1][key]), key
        assert torch.allclose(first[1][key], value, rtol=1e-3, atol=1e-4), key


@pytest.mark.slow
def test_evaluation_on_two_ranks_counts_every_image_once(two_ranks):
    single = evaluated()
    assert two_ranks[0]["evaluation"] == single and two_ranks[1]["evaluation"] in ({}, None)
    assert single["classification"]["images"] == 40 == len(DatasetCatalog.get("tests_digits_val"))
    assert single["classification"]["top1"] == pytest.approx(100 * 26 / 40)
    assert single["classification"]["top5"] == 100


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "opts",
    [
        ["SOLVER.IMS_PER_BATCH", 1],
        ["SOLVER.IMS_PER_BATCH", 2],
        ["SOLVER.IMS_PER_BATCH", 8, "SOLVER.MICRO_BATCHES", 4],
    ],
    ids=["one image", "two images", "two at once"],
)
def test_batch_norm_on_too_few_values(make_digits_cfg, opts):
    """A ResNet's last maps of digits are 1 x 1."""
    cfg = make_digits_cfg(["MODEL.CLASSIFIER.NAME", "resnet18", "MOKD.ENABLED", False, *opts])
    with pytest.raises(ValueError, match="BatchNorm 'layer4.0.bn1' sees [12] value"):
        build_trainer(cfg)
