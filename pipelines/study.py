"""A whole study from a YAML file: pretrain, embed, predict, report.

    python pipelines/study.py pipelines/cohort.yaml

Each step is a call that can be left out, changed or run alone. Run the script again and it does
what is missing. It is the same as ``nidl-dcl study --config FILE``. If the file names an encoder of
your own, give its package after the file.
"""

from __future__ import annotations

import sys

import nidl_dcl.workflow.study as stages
from nidl_dcl.io.console import ConsoleReporter
from nidl_dcl.output.folder import Output
from nidl_dcl.workflow.options import read_study


def main(file: str, *trust: str) -> None:
    options = read_study(file, trust)
    console = ConsoleReporter()
    run = options.run
    output = Output(
        options.bids_dir,
        options.output_dir,
        work_dir=run.work_dir,
        command=sys.argv,
        share=run.share,
        share_key=run.share_key,
    )
    with output.writing():
        # 0. What cannot be studied is refused before anything is computed.
        stages.configure(output, options, console)

        # 1. An encoder learns, without labels, to tell participants apart whatever their view.
        if options.model is None:
            stages.pretrain(
                output,
                options.data,
                options.training,
                run,
                console,
                group=options.prediction.group,
            )

        # 2. One embedding per image: a table of ids and a matrix, row by row.
        embeddings = stages.embed(
            output,
            options.data,
            run,
            model_folder=options.model,
            trust=trust,
            console=console,
            group=options.prediction.group,
        )
        print(f"{len(embeddings.table)} images, {embeddings.matrix.shape[1]} numbers each")

        # 3. Phenotypes from embeddings, cross-validated by participant, beside their baselines.
        rows = stages.predict(
            output,
            options.target,
            options.data,
            run,
            options.prediction,
            trust=trust,
            console=console,
        )

        # 4. One page about all of it.
        page = stages.report(output, run)
    print(stages.summary_table(rows))
    print(page)


if __name__ == "__main__":
    main(*sys.argv[1:])
