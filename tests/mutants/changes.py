"""The changes that are made to a module: comparisons, operators, conditions, constants, returns and loops."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

import parso
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from parso.tree import NodeOrLeaf

Position = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change: the line's number, what stands there, what would; and the whole module with it."""

    line: int
    before: str
    after: str
    source: str


class _NegatedCondition(Operator):
    """Turns the condition of an if, elif, while, assert, conditional expression or comprehension round."""

    def mutation_positions(self, node: NodeOrLeaf) -> Iterable[Position]:
        return [(node.children[i].start_pos, node.children[i].end_pos) for i in self._conditions(node)]

    def mutate(self, node: NodeOrLeaf, index: int) -> NodeOrLeaf:
        at = self._conditions(node)[index]
        node.children[at] = parso.parse(f" (not ({node.children[at].get_code().strip()}))")
        return node

    @staticmethod
    def _conditions(node: NodeOrLeaf) -> list[int]:
        match node.type:
            case "if_stmt" | "while_stmt":
                return [i + 1 for i, child in enumerate(node.children) if child.get_code().strip() in KEYWORDS]
            case "assert_stmt" | "comp_if":
                return [1]
            case "ternary" | "test":
                return [2]
            case _:
                return []

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


KEYWORDS = {"if", "elif", "while"}


class _Membership(Operator):
    """``in`` to ``not in`` and back."""

    def mutation_positions(self, node: NodeOrLeaf) -> Iterable[Position]:
        return [(node.children[i].start_pos, node.children[i].end_pos) for i in self._words(node)]

    def mutate(self, node: NodeOrLeaf, index: int) -> NodeOrLeaf:
        at = self._words(node)[index]
        word = node.children[at].get_code().split()
        node.children[at] = parso.parse(" in" if len(word) == 2 else " not in")
        return node

    @staticmethod
    def _words(node: NodeOrLeaf) -> list[int]:
        if node.type != "comparison":
            return []
        return [i for i, child in enumerate(node.children) if child.get_code().split() in (["in"], ["not", "in"])]

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class _NothingReturned(Operator):
    """``return x`` to ``return None``."""

    def mutation_positions(self, node: NodeOrLeaf) -> Iterable[Position]:
        if node.type == "return_stmt" and node.children[1].get_code().strip() != "None":
            yield node.start_pos, node.end_pos

    def mutate(self, node: NodeOrLeaf, index: int) -> NodeOrLeaf:
        node.children[1] = parso.parse(" None")
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


_COSMIC_RAYS = (
    "ReplaceComparisonOperator_Eq_NotEq",
    "ReplaceComparisonOperator_NotEq_Eq",
    "ReplaceComparisonOperator_Is_IsNot",
    "ReplaceComparisonOperator_IsNot_Is",
    "ReplaceComparisonOperator_Lt_LtE",
    "ReplaceComparisonOperator_Lt_GtE",
    "ReplaceComparisonOperator_LtE_Lt",
    "ReplaceComparisonOperator_LtE_Gt",
    "ReplaceComparisonOperator_Gt_GtE",
    "ReplaceComparisonOperator_Gt_LtE",
    "ReplaceComparisonOperator_GtE_Gt",
    "ReplaceComparisonOperator_GtE_Lt",
    "ReplaceBinaryOperator_Add_Sub",
    "ReplaceBinaryOperator_Sub_Add",
    "ReplaceBinaryOperator_Mul_Div",
    "ReplaceBinaryOperator_Div_Mul",
    "ReplaceBinaryOperator_FloorDiv_Mul",
    "ReplaceBinaryOperator_Mod_Mul",
    "ReplaceBinaryOperator_Pow_Mul",
    "ReplaceBinaryOperator_BitOr_BitAnd",
    "ReplaceBinaryOperator_BitAnd_BitOr",
    "ReplaceUnaryOperator_Delete_Not",
    "ReplaceUnaryOperator_Delete_USub",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "NumberReplacer",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "ZeroIterationForLoop",
)


def changes(source: str) -> Iterator[Change]:
    """Yield each change that can be made to a module, leaving out annotations and decorators, which decide nothing."""
    operators = [plugins.get_operator(f"core/{name}")() for name in _COSMIC_RAYS]
    seen = {source}
    for operator in (*operators, _NegatedCondition(), _Membership(), _NothingReturned()):
        places = [node for node in ast_nodes(get_ast(source)) for _ in operator.mutation_positions(node)]
        for occurrence, node in enumerate(places):
            if _decides(node):
                changed = mutate_code(source, operator, occurrence)
                if changed not in seen and _compiles(changed):
                    seen.add(changed)
                    yield _change(source, changed)


def _decides(node: NodeOrLeaf) -> bool:
    """Tell whether a node is part of what runs: neither of an annotation, a decorator nor the list of parameters."""
    while (parent := node.parent) is not None:
        if parent.type in ("decorator", "parameters") or (parent.type == "param" and parent.annotation is node):
            return False
        if parent.type == "tfpdef" or (parent.type == "annassign" and node is parent.children[1]):
            return False
        if parent.type == "funcdef" and parent.annotation is node:
            return False
        if parent.type == "param" and parent.default is node:
            return True
        node = parent
    return True


def _compiles(source: str) -> bool:
    try:
        compile(source, "changed", "exec")
    except SyntaxError:
        return False
    return True


def _change(source: str, changed: str) -> Change:
    pairs = zip_longest(source.splitlines(), changed.splitlines(), fillvalue="")
    line, (before, after) = next((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    return Change(line=line, before=before.strip(), after=after.strip(), source=changed)
