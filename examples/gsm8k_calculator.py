"""GSM8K with a calculator tool, for a chat model whose template supports tools.

::

    python examples/gsm8k_calculator.py models/my-chat-model gsm8k/train.jsonl --tool-parser hermes training.lr=2e-6

Each line of the file has a ``question`` and an ``answer`` that ends with ``#### <number>``. The template shows the
tool's docstring to the policy, which reads results and errors of its calls, but is not trained on them. To a model
whose own template has no place for tools, give one that has: ``data.chat_template=examples/chatml_tools.jinja``.
"""

from __future__ import annotations

import argparse
import ast
import operator

from rlhf_ray import PPOConfig

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
PROMPT_TEMPLATE = (
    "{prompt}\n\nUse the calculator. End with a last line that holds nothing but #### and the final number."
)


def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: Numbers, + - * / and parentheses, for example "(48 + 24) / 2".
    """
    if len(expression) > 200:
        raise ValueError("longer than 200 characters")
    return f"{value_of(ast.parse(expression.strip(), mode='eval').body):.10g}"


def value_of(node: ast.expr) -> float:
    """Evaluate a syntax tree; unlike ``eval``, this cannot execute code, and floats cannot become large integers."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return float(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value_of(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return float(OPERATORS[type(op)](value_of(left), value_of(right)))
    raise ValueError(f"{ast.unparse(node)!r} is not arithmetic: use numbers, + - * / and parentheses")


def config(model: str, rows: str, tool_parser: str) -> PPOConfig:
    """Build the run; ``max_new_tokens`` bounds all turns of a trajectory, together with the tool's results."""
    return (
        PPOConfig()
        .model(path=model)
        .data(path=rows, prompt_column="question", prompt_template=PROMPT_TEMPLATE, as_chat=True, batch_size=64)
        .environment(tools=[calculator], max_turns=6, tool_parser=tool_parser)
        .rollouts(group_size=4, max_prompt_tokens=1024, max_new_tokens=768)
        .rewards("gsm8k")
        .training(iterations=200, lr=1e-6, critic_lr=1e-5, num_minibatches=4, gamma=1.0, lambda_=1.0)
    )


def main() -> None:
    """Train, and print the mean reward and the number of turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="path or hub id of a chat model")
    parser.add_argument("rows", help="JSONL file with the columns question and answer")
    parser.add_argument("--tool-parser", default="hermes", help="vLLM's parser for the model's calls")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="settings to override")
    args = parser.parse_args()
    algo = config(args.model, args.rows, args.tool_parser).apply_overrides(args.overrides).build_algo()
    try:
        while algo.iteration < algo.settings.training.iterations:
            rollouts = algo.train()["rollouts"]
            print(f"reward {rollouts['reward_mean']:.3f}   turns {rollouts['turns_mean']:.2f}", flush=True)
    finally:
        algo.stop()


if __name__ == "__main__":
    main()
