# ruff: noqa: E501
"""The cost of a program from its text, on texts that are written by hand."""

import doctest

import pytest

from mtl_jax.planning import program_cost
from mtl_jax.planning.program_cost import Collective, FusedKernel, place

TEXT = """HloModule jit_train_step, is_scheduled=true

%inside (p: f32[8]) -> f32[8] {
  ROOT %never = f32[8]{0} add(%p, %p), backend_config={"window_config":{"estimated_cycles":"1000000"}}
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], /*index=1*/f32[8]{0:T(128)}) parameter(0)
  %layer = f32[8]{0} fusion(%state), calls=%inside, metadata={op_name="jit(train_step)/jvp(Encoder)/layer_1/attention/dot_general"}, backend_config={"window_config":{"estimated_cycles":"10"}}
  %sum = f32[8]{0} all-reduce(%layer), to_apply=%add, metadata={op_name="jit(train_step)/psum"}
  ROOT %next = (s32[], f32[8]{0}) tuple(%state, %sum)
}

%solver (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  ROOT %better = (s32[], f32[8]{0}) fusion(%state), calls=%inside, backend_config={"window_config":{"estimated_cycles":"7"}}
}

%first (x: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} copy(%x), backend_config={"window_config":{"estimated_cycles":"3"}}
}

%second (x: f32[8]) -> f32[8] {
  ROOT %b = f32[8]{0} copy(%x), backend_config={"window_config":{"estimated_cycles":"4"}}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %backward = bf16[4,2]{1,0} convolution(%x), metadata={op_name="jit(train_step)/transpose(jvp(Encoder))/layer_0/attention/dot_general"}, backend_config={"estimated_cycles":"100"}
  %loop = (s32[], f32[8]{0}) while(%x), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  %solved = (s32[], f32[8]{0}) while(%loop), condition=%test, body=%solver
  %gathered = (f32[8]{0}, f32[4,8]{1,0}) all-gather-start(%x), dimensions={0}
  %done = f32[4,8]{1,0} all-gather-done(%gathered)
  ROOT %chosen = f32[8]{0} conditional(%x), branch_computations={%first, %second}
}
"""


def test_loops_count_by_their_rounds_and_branches_each():
    cost = program_cost.read(TEXT)
    assert cost.places == {
        "backward Encoder/layer_*/attention": 100,
        "forward Encoder/layer_*/attention": 60,
        "copy": 7,
        "fusion": 7,
    }
    assert cost.cycles == 174
    assert cost.unknown_loops == 1
    assert cost.kernels == 1 + 2 * 6 + 1 + 1 + 2  # the product, the layers and their sums, the solver, the gather, the branches


def test_what_devices_send_each_other():
    """Of a loop in every round; of an operation that only starts its result, not also its operand."""
    assert program_cost.read(TEXT).collectives == {
        "all-gather": Collective(times=1, bytes=4 * 8 * 4),
        "all-reduce": Collective(times=6, bytes=6 * 8 * 4),
    }


@pytest.mark.parametrize(
    "program",
    [
        """%all-reduce-scatter.3 (whole: bf16[6,8]) -> bf16[6,2] {
  %whole = bf16[6,8]{1,0} parameter(0)
  %sum = bf16[6,8]{1,0} all-reduce(%whole), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %mine = bf16[6,2]{1,0} dynamic-slice(%sum, %zero, %place), dynamic_slice_sizes={6,2}
}

ENTRY %main (x: bf16[6,8]) -> bf16[6,2] {
  %x = bf16[6,8]{1,0} parameter(0)
  ROOT %y = bf16[6,2]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
}
""",
        """ENTRY %main (x: bf16[6,8]) -> bf16[6,2] {
  %x = bf16[6,8]{1,0} parameter(0)
  ROOT %y = bf16[6,2]{1,0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, dimensions={1}, to_apply=%add
}
""",
        """ENTRY %main (x: bf16[6,8]) -> bf16[6,2] {
  %x = bf16[6,8]{1,0} parameter(0)
  ROOT %y = bf16[6,2]{1,0} reduce-scatter(%x), replica_groups=[1,4]<=[4], dimensions={1}, to_apply=%add
}
""",
    ],
    ids=["in a fusion", "groups as lists", "groups in short"],
)
def test_of_a_reduce_scatter_the_whole_array_counts(program):
    """A device gives three of its four parts away; the fourth is the result. The compilers write it in three ways."""
    assert program_cost.read(program).collectives == {"reduce-scatter": Collective(times=1, bytes=6 * 8 * 2)}


FUSED = """
%start (x: f32[2]) -> (f32[2], f32[8]) {
  %gather = f32[8]{0} all-gather(%x), dimensions={0}
  ROOT %begun = (f32[2]{0}, f32[8]{0}) custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}

%goes_on (x: f32[2]) -> f32[8] {
  ROOT %gather = f32[8]{0} all-gather(%x), dimensions={0}
}

%all-reduce-scatter.1 (x: f32[8]) -> f32[2] {
  %sum = f32[8]{0} all-reduce(%x), to_apply=%add
  ROOT %part = f32[2]{0} dynamic-slice(%sum)
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %begun = (f32[2]{0}, f32[8]{0}) fusion(%x), kind=kCustom, calls=%start
  %whole = f32[8]{0} fusion(%begun), kind=kCustom, calls=%goes_on
  ROOT %part = f32[2]{0} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(f)/g"}
}
"""


def test_collectives_inside_of_fusions():
    """A gather that is begun and ended by two fusions counts once; a sum of which a device keeps a part is one operation."""
    collectives = program_cost.read(FUSED).collectives
    assert collectives == {"all-gather": Collective(1, 32), "reduce-scatter": Collective(1, 32)}


def test_a_program_without_estimates():
    cost = program_cost.read("ENTRY %main (x: pred[3]) -> pred[3] {\n  ROOT %x = (pred[3]{0}, s4[8]{0}) all-to-all(%y)\n}")
    assert cost.cycles is None
    assert cost.collectives == {"all-to-all": Collective(1, 3 + 4)}


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        ("jit(train_step)/vmap(jvp(Head))/output/dot_general", "forward Head/output"),
        ("jit(train_step)/while/body/closed_call/transpose(jvp(Encoder))/layer_11/norm/mul", "backward Encoder/layer_*/norm"),
        ("jit(train_step)/optimizer/jit(_where)/select_n", "optimizer"),
        ("all-reduce", "all-reduce"),
        (
            "jit(f)/transpose(jvp(Encoder))/layer_0/checkpoint/Encoder/layer_0/layer_0.call/layer_0/attention/key/dot_general",
            "backward Encoder/layer_*/attention/key",
        ),
    ],
)
def test_places(op_name, expected):
    assert place(op_name) == expected


def test_examples():
    assert not doctest.testmod(program_cost).failed


def test_fused_kernels_by_their_operations_or_bytes():
    """Four heads that share the lanes of a unit take four times their own operations."""
    kernel = (
        '  %{name} = bf16[8]{{0}} custom-call(%x), custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/jvp(Encoder)/{path}/pallas_call"}}, '
        'backend_config={{"custom_call_config":{{"body":"TUzv","cost_estimate":{{"flops":"{flops}","transcendentals":"0","bytes_accessed":"80"}}}}}}'
    )
    lines = [
        kernel.format(name="a", path="layer_0/attention/attention_forward_of_4_heads", flops=100),
        kernel.format(name="b", path="layer_1/attention/attention_forward_of_4_heads", flops=100),
        kernel.format(name="c", path="layer_0/norm/norm_forward", flops=10),
    ]
    cost = program_cost.read("\n".join(["ENTRY %main (x: bf16[8]) -> bf16[8] {", *lines, "}"]))
    assert cost.fused == {
        "forward Encoder/layer_*/attention/attention_forward_of_4_heads": FusedKernel(800, 160),
        "forward Encoder/layer_*/norm/norm_forward": FusedKernel(10, 80),
    }
    assert cost.cycles is None
    assert cost.fused_cycles(operations_per_cycle=10, bytes_per_cycle=4) == 80 + 20
