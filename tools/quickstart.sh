#!/usr/bin/env bash
# From a fresh clone to a trained Mask R-CNN: creates .venv, makes the sample data, trains, evaluates
# and draws. Can be run again at any time: finished steps are skipped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$PROJECT_DIR"
CONFIG=configs/sample/mask-rcnn_vmamba-sample_coco.py
WORK=work_dirs/quickstart${STACK:+-$STACK}
LOGS=$WORK/logs
PICTURE=$WORK/predictions.png

# Drops from mmengine's progress lines what does not tell how far it is.
shorten() {
    sed -u -E 's/ - mmengine - [A-Z]+ - / /; s/base_lr: [^ ]+ +lr: [^ ]+ +//; s/time: [^ ]+ +data_time: [^ ]+ +//
        s/grad_norm: [^ ]+ +//; s/^/   /'
}

# logged NAME PATTERN COMMAND...: shows the lines of a command's output that match, logs all of it.
logged() {
    local name=$1 pattern=$2 begin=$SECONDS
    shift 2
    mkdir -p "$LOGS"
    pattern+='|[A-Za-z]Error:|^error: '
    if ! "$@" 2>&1 | tee "$LOGS/$name.log" | { grep --line-buffered -E "$pattern" || true; } | shorten; then
        printf '\n' >&2
        tail -n 15 "$LOGS/$name.log" >&2
        printf '\n' >&2
        fail "$name did not finish; its whole log is $PROJECT_DIR/$LOGS/$name.log. Run the same command again to continue."
    fi
    printf -- '   finished in %s\n' "$(elapsed $((SECONDS - begin)))"
}

printf '== 1/5 environment\n'
bash tools/setup_env.sh
unset PYTHONPATH PYTHONHOME
export VIRTUAL_ENV=$VENV PATH=$VENV/bin:$PATH
hide_unusable_gpu

printf '== 2/5 sample data (about 1 min)\n'
python tools/dataset_tools/make_sample_data.py --overwrite

printf '== 3/5 training Mask R-CNN (at most 10 min on two cores)\n'
# Another recipe or other data is another training: it does not continue from these checkpoints.
recipe=$(cat configs/sample/*.py configs/sample/_base_/*.py data/sample/manifest.json | cksum)
if [[ -d $WORK && $(cat "$WORK/recipe" 2>/dev/null) != "$recipe" ]]; then
    kept=$WORK-$(date +%Y%m%d-%H%M%S)
    mv "$WORK" "$kept"
    printf '   the recipe has changed; the earlier training is kept in %s\n' "$kept"
fi
mkdir -p "$WORK"
printf '%s\n' "$recipe" >"$WORK/recipe"
if [[ -f $WORK/trained ]]; then
    printf '   already done: %s\n' "$(<"$WORK/trained")"
else
    # Tested below: the training's own last evaluation would be the same one.
    logged train 'Epoch\(train\)|--resume:|resumed epoch|Saving checkpoint' \
        bash tools/dist_train.sh "$CONFIG" 1 --work-dir "$WORK" --resume --no-validate
    # By name: the checkout may be moved.
    basename "$(<"$WORK/last_checkpoint")" >"$WORK/trained"
fi
checkpoint=$WORK/$(<"$WORK/trained")

printf '== 4/5 evaluation on images that were not trained on (about 1 min)\n'
logged test 'Epoch\(test\)|bbox_mAP:|segm_mAP:' \
    bash tools/dist_test.sh "$CONFIG" "$checkpoint" 1 --work-dir "$WORK/test"

printf '== 5/5 picture\n'
logged picture '^all of them' python tools/analysis_tools/visualize.py "$CONFIG" "$checkpoint" --num 12 \
    --out-dir "$WORK/pictures" --sheet "$PICTURE"

map() { sed -nE "s/.*coco\/$1_mAP: ([-0-9.]+) .*/\1/p" "$LOGS/test.log" | tail -n 1; }
bbox=$(map bbox) segm=$(map segm)
[[ -n $bbox && -n $segm ]] || fail "the evaluation reported no mAP; see $LOGS/test.log."
printf '\nbbox mAP %s, segm mAP %s\nCheckpoint: %s\nPicture:    %s (ground truth left, predictions right)\n' \
    "$bbox" "$segm" "$checkpoint" "$PROJECT_DIR/$PICTURE"
awk -v bbox="$bbox" -v segm="$segm" 'BEGIN { exit !(bbox >= 0.3 && segm >= 0.3) }' ||
    fail "both were expected to reach 0.30: something in this environment does not learn as it should. Run: bash tools/run_tests.sh"
