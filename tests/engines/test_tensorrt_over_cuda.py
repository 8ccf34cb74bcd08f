"""TensorRT's runtime, unmodified, over the plans of backend cuda: on a GPU where there is one, else on the emulator."""

from __future__ import annotations

import inspect
import weakref

import numpy as np
import pytest

from pascalvl.engines import open_engine
from pascalvl.engines.device.memory import available_target
from pascalvl.engines.tensorrt.profiles import Limits
from pascalvl.plugins import bindings
from pascalvl.plugins.kernels.build import Target
from pascalvl.runtime import VisionLanguageModel
from tests.engines.batches import CAPACITY, POOL, alone, changed, decodes, fresh_pool, places
from tests.engines.bindings_8_6 import MEMBERS
from tests.engines.plan_behind_tensorrt import PlanAsContext, PlanAsEngine, behind_tensorrt
from tests.engines.torch_reference import answer, assistant, reference_answer, scene, user

pytestmark = pytest.mark.usefixtures("cuda_anywhere")

ON_GPU = available_target() is Target.CUDA
NEW_TOKENS = 32 if ON_GPU else 4
LIMITS = Limits(prefill_chunk=16, max_patches=64, max_context=512)
PICTURE = [user(scene(1, 64, 64), "Describe the picture.")]
TURNS = [*PICTURE, assistant("A grid."), user("Which shapes are red?")]


@pytest.mark.parametrize("kv", ["f32", "k8v8", "k4v4,layer.0-1=f16,layer.3=k8v8"])
def test_tokens_are_those_of_the_plans(kv, nano_engine, nano_reference):
    """Chunks, a prefix that is not run again, decode steps; of a quantised cache to the token as backend cuda."""
    bundle = nano_engine(kv, "cuda")
    engine = open_engine(bundle)
    model = VisionLanguageModel(behind_tensorrt(engine, bundle, LIMITS), 160, 512)
    direct = VisionLanguageModel(engine, 160, 512)
    for messages in (PICTURE, TURNS):
        found = answer(model, messages, NEW_TOKENS).token_ids
        assert found == answer(direct, messages, NEW_TOKENS).token_ids
        if kv == "f32":
            assert found == reference_answer(nano_reference, model.prompt(messages), NEW_TOKENS)[0]
    assert (model.decode_launches() is not None) == ON_GPU  # captured


def test_steps_of_several_sequences(nano_engine):
    bundle = nano_engine("f32", "cuda")
    session = behind_tensorrt(open_engine(bundle), bundle, LIMITS).open_session(CAPACITY, POOL)
    sequences = decodes(session)[:3]
    pool = fresh_pool(session)
    expected = alone(session, sequences)[bindings.LOGITS]
    for _ in range(2):
        fresh_pool(session)
        np.testing.assert_array_equal(session.step(sequences)[bindings.LOGITS], expected)
        assert changed(session, pool) == places(sequences)


def test_its_objects_end_before_the_device_is_closed(nano_engine, monkeypatch):
    bundle = nano_engine("f32", "cuda")
    engine = behind_tensorrt(open_engine(bundle), bundle, LIMITS)
    left = weakref.WeakSet(engine.plans.values())
    create = PlanAsEngine.create_execution_context_without_device_memory

    def noted(self):
        left.add(context := create(self))
        return context

    monkeypatch.setattr(PlanAsEngine, "create_execution_context_without_device_memory", noted)
    model = VisionLanguageModel(engine, 160, 512, reopen=lambda: engine)
    answer(model, PICTURE, 2)
    assert len(left) > 3
    closed = []
    monkeypatch.setattr(type(engine.device), "close", lambda _: closed.append(len(left)))
    model.unload()
    assert closed == [0]


def test_it_has_the_members_of_8_6_1_that_are_used():
    for kind, owner in ((PlanAsEngine, "ICudaEngine"), (PlanAsContext, "IExecutionContext")):
        source = inspect.getsource(kind)
        for member in MEMBERS[owner]:
            assert f"def {member}(" in source or f"self.{member} =" in source, member
