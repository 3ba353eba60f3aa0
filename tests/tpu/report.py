"""Prints a table of the train steps, as traced and as compiled for TPUs.

python -m tests.tpu.report
"""

from tests.tpu import compiler, lowering, programs


def rows():
    """Yields the cells of the table, a list of strings per row."""
    yield [
        "train step",
        "all-reduces as traced",
        "as compiled",
        "numbers",
        "bytes",
        "all-to-alls",
        *(f"{t}: KiB, s" for t in compiler.TOPOLOGIES),
    ]
    for name in programs.PROGRAMS:
        text = programs.stablehlo(name)
        traced = lowering.all_reduced(text)
        compiled = [compiler.compiled(text, t) for t in compiler.TOPOLOGIES]
        counts = {str(len(c.all_reduced)) for c in compiled}
        values = [value for group in traced for value in group]
        yield [
            name,
            str(len(traced)),
            "/".join(sorted(counts)),
            f"{sum(value.size for value in values):,}",
            f"{sum(value.bytes for value in values):,}",
            str(lowering.num_all_to_alls(text)),
            *(
                f"{c.temporary_bytes / 1024:,.0f}, {c.seconds:.1f}"
                for c in compiled
            ),
        ]


def main():
    """Prints the table as Markdown."""
    for number, cells in enumerate(rows()):
        print(f"| {' | '.join(cells)} |", flush=True)
        if number == 0:
            print("|---" * len(cells) + "|")


if __name__ == "__main__":
    main()
