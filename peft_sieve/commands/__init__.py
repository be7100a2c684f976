"""The commands of `peft-sieve`, a file each.

A command is a module with `NAME`, `HELP` (one line), `EXAMPLES` (shown below its options), `add_arguments(parser)` and
`run(args) -> int`, the exit code. It imports what is slow inside `run`, so that `--help` answers at once. What several
commands share lies beside them: `loading`, `options`, `output`.
"""
