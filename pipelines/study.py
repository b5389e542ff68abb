"""A whole study from a YAML file: pretrain, embed, predict, report.

    python pipelines/study.py pipelines/cohort.yaml

Each step is a call that can be left out, changed or run alone. Run the script again and it does
what is missing. It is the same as ``nidl-dcl study --config FILE``. If the file names an encoder of
your own, give its package after the file.
"""

from __future__ import annotations

import sys

from nidl_dcl.evaluation.summary import summary_table
from nidl_dcl.io.console import ConsoleHandler, handled_by
from nidl_dcl.workflow.embed import embed
from nidl_dcl.workflow.options import read_study
from nidl_dcl.workflow.predict import predict
from nidl_dcl.workflow.pretrain import pretrain
from nidl_dcl.workflow.study import configure, open_study, report


def main(file: str, *trust: str) -> None:
    options = read_study(file, trust)
    study = open_study(
        options.bids_dir,
        options.output_dir,
        options.data,
        options.run,
        options.training,
        options.prediction,
        trust=trust,
        command=sys.argv,
    )
    with handled_by(ConsoleHandler()), study.output.writing():
        # 0. The dataset is indexed, checked and joined with phenotypes, once for all steps; what
        #    cannot be studied is refused before anything is computed.
        configure(study, options)

        # 1. An encoder learns, without labels, to tell participants apart whatever their view.
        if options.model is None:
            pretrain(study, options.training)

        # 2. One embedding per image: a table of ids and a matrix, row by row.
        embeddings = embed(study, options.model)
        print(f"{len(embeddings.table)} images, {embeddings.matrix.shape[1]} numbers each")

        # 3. Phenotypes from embeddings, cross-validated by participant, beside their baselines.
        rows = predict(study, options.target, options.prediction)

        # 4. One page about all of it.
        page = report(study)
    print(summary_table(rows))
    print(page)


if __name__ == "__main__":
    main(*sys.argv[1:])
