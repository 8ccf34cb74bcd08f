"""Plans at work: the kernels' arguments for one set of sizes and addresses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

from pascalvl.engines.cuda.plan import ALIGNMENT, Node, Plan
from pascalvl.engines.device.memory import Device
from pascalvl.plugins import bindings
from pascalvl.plugins.kernels.library import AttentionArgs, LinearArgs, Rows
from pascalvl.plugins.kv_format import KVFormat
from pascalvl.plugins.ops.flash_attention.op import ATTR_KV_FORMAT, AttentionOptions

Launch = Callable[[], None]


class BoundPlan:
    """A plan with sizes, on a device.

    Args:
        plan: of a graph.
        device: what runs it.
        weights: address of the graph's weights.
        sizes: of the dimensions that vary, by the names of `bindings`.
        pointers: of what is given, by name. Where `bindings.DEEPSTACK_EMBEDS` is not, nothing is added to layers.
    """

    def __init__(
        self, plan: Plan, device: Device, weights: int, sizes: Mapping[str, int], pointers: Mapping[str, int]
    ) -> None:
        self._plan, self._device, self._weights, self._sizes, self._pointers = plan, device, weights, sizes, pointers
        parts = {name: matrix.part_of for name, matrix in plan.matrices.items() if matrix.part_of}
        missing = {name for name, (whole, _) in parts.items() if whole not in pointers}
        self._nodes = [node for node in plan.nodes if node.call != "add_to" or node.tensors["y"] not in missing]
        # Where more rows are picked than there are.
        self._units = max(sizes[plan.dimension], sizes.get("rows", 0))
        self._intermediate = plan.unit * self._units
        args = (self._args(node, ALIGNMENT) for node in self._unlike())
        self.nbytes = self._intermediate + max(map(self._workspace_of, args), default=0)
        """Of memory that it works in, whose contents it neither expects nor leaves."""

    def launches(self, memory: int) -> list[Launch]:
        """What starts the kernels, in order, on ``nbytes`` of memory at an address."""
        return [self._launch(node, memory) for node in self._nodes]

    def _unlike(self) -> list[Node]:
        """Nodes that need other amounts of workspace: layers of a model are alike."""
        seen: dict[tuple[object, ...], Node] = {}
        for node in self._nodes:
            rows = self._rows(node.tensors["x"]) if node.call == "linear" else 0
            seen.setdefault((node.call, rows, *node.attributes.items()), node)
        return list(seen.values())

    def _workspace_of(self, args: LinearArgs | AttentionArgs | None) -> int:
        kernels = self._device.kernels
        if isinstance(args, LinearArgs):
            return kernels.linear_workspace(args)
        return kernels.attention_workspace(args) if args else 0

    def _at(self, name: str, memory: int) -> int:
        """Address of a tensor."""
        if name in self._pointers:
            return self._pointers[name]
        if name in self._plan.weights:
            return self._weights + self._plan.weights[name]
        matrix = self._plan.matrices[name]
        if matrix.part_of:
            whole, number = matrix.part_of
            return self._pointers[whole] + number * matrix.nbytes(self._sizes)
        return memory + cast(int, matrix.offset) * self._units

    def _rows(self, name: str) -> int:
        return self._plan.matrices[name].rows(self._sizes)

    def _args(self, node: Node, memory: int) -> LinearArgs | AttentionArgs | None:
        pointers = {argument: self._at(name, memory) for argument, name in node.tensors.items()}
        if node.call == "linear":
            return LinearArgs(**pointers, **node.attributes, rows=self._rows(node.tensors["x"]))
        return self._attention(node, pointers) if node.call == "attention" else None

    def _attention(self, node: Node, pointers: dict[str, int]) -> AttentionArgs:
        kv_format = KVFormat(node.attributes[ATTR_KV_FORMAT] or KVFormat.F32)
        attributes: dict[str, Any] = {**node.attributes, ATTR_KV_FORMAT: kv_format}
        options = AttentionOptions(**attributes)
        sizes, more = self._sizes, {}
        if options.causal:
            new, pool = (
                Rows(**{name: pointers.pop(f"{prefix}_{name}", 0) for name in ("key", "value", "scale")})
                for prefix in ("new", "past")
            )
            more = {"new_rows": new, "pool": pool, "rotated": options.layout.is_rotated}
            more["key_format"], more["value_format"] = options.kv_format.rows
            more |= {"num_pages": sizes[bindings.PAGES], "sequence_pages": sizes[bindings.SEQUENCE_PAGES]}
            if sizes["visible_slots"] == 1:
                pointers["past_visible"] = 0  # all slots alike
        return AttentionArgs(
            **pointers,
            **more,
            tokens=self._rows(node.tensors["qkv"]),
            batch=sizes["batch"] if options.causal else sizes["segments_plus_1"] - 1,
            num_heads=options.num_heads,
            num_kv_heads=options.num_kv_heads,
            head_dim=options.head_dim,
            value_dim=options.value_dim,
            softmax_scale=options.softmax_scale,
            epsilon=options.epsilon,
            causal=options.causal,
        )

    def _launch(self, node: Node, memory: int) -> Launch:
        kernels, stream = self._device.kernels, self._device.stream
        if args := self._args(node, memory):
            workspace = memory + self._intermediate, self.nbytes - self._intermediate
            if isinstance(args, LinearArgs):
                return functools.partial(kernels.linear, args, *workspace, stream)
            return functools.partial(kernels.attention, args, *workspace, stream)
        at = {argument: self._at(name, memory) for argument, name in node.tensors.items()}
        if node.call == "gather_rows":
            matrix = self._plan.matrices[node.tensors["matrix"]]
            sizes = matrix.rows(self._sizes), matrix.width, self._sizes["rows"]
            return functools.partial(
                kernels.gather_rows, at["matrix"], *sizes[:2], at["rows"], sizes[2], at["out"], stream
            )
        matrix = self._plan.matrices[node.tensors["x"]]
        return functools.partial(kernels.add_to, at["x"], at["y"], matrix.rows(self._sizes), matrix.width, stream)
