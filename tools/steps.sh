# To be sourced. A plan of steps: printed first, then run, each with its time and what is left. What a step prints goes to a
# log, and to the screen if it fails (VERBOSE=1: always). What a step leaves out it must say, with the word "skipped".
#
#   plan SECONDS NAME COMMAND…      puts a step on the plan, with the time it takes the first time on two cores
#   beside LANE SECONDS NAME …      the same; steps of several lanes that follow each other run side by side
#   run_plan TITLE                  runs them; after a failure no more are started (KEEP_GOING=1: they are)
#
# Its last line is "TITLE: 9 passed, 0 failed".

step_seconds=() step_names=() step_commands=() step_lanes=()
beside() {
    step_lanes+=("$1") step_seconds+=("$2") step_names+=("$3")
    shift 3
    step_commands+=("$(printf '%q ' "$@")")
}
plan() { beside '' "$@"; }

minutes() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

bold=$'\033[1m' red=$'\033[31m' plain=$'\033[0m'
[ -t 1 ] && [ -z "${NO_COLOR:-}" ] || bold='' red='' plain=''

# Steps one after the other, in the background: each leaves NUMBER.log and, at its end, NUMBER.end with its code and time.
run_lane() { # LOGS STEP…
    local logs=$1 lane=$1/lane.$BASHPID.pid i code start
    shift
    echo $BASHPID >"$lane"
    for i in "$@"; do
        [ -n "${KEEP_GOING:-}" ] || ! grep -qsv '^0 ' "$logs"/*.end || break
        start=$SECONDS code=0
        timeout -k 10 "$(limit_of "$i")" bash -c "set -euo pipefail; ${step_commands[i]}" >"$logs/$((i + 1)).log" 2>&1 </dev/null &
        echo $! >"$logs/$((i + 1)).pid"
        wait $! || code=$?
        echo "$code $((SECONDS - start))" >"$logs/$i.new"
        mv "$logs/$i.new" "$logs/$((i + 1)).end"
    done
    rm "$lane"
}

# What takes so long beside any load hangs, and must not take the others with it.
limit_of() { echo $((300 + 10 * step_seconds[$1])); }

# Each step is a group of its own, which Ctrl-C does not reach. Its lane first, which would begin the next one.
end_all() { # LOGS
    local begun
    for begun in "$1"/lane.*.pid "$1"/[0-9]*.pid; do
        [ ! -e "$begun" ] || [ -e "${begun%.pid}.end" ] || kill "$(<"$begun")" 2>/dev/null || true
    done
}

# Nothing if there is none yet, which is no error.
last_line() { # LOG
    tail -c 300 "$1" | tr '\r' '\n' | tr -cd '[:print:]\n' | { grep -v '^ *$' || true; } | tail -n 1 | cut -c 1-70
}

tell_end() { # LOGS STEP
    local log=$1/$2.log code took verdict=passed
    read -r code took <"$1/$2.end"
    [ "$code" = 0 ] || verdict="${red}FAILED${plain} ($code)"
    [ "$code" != 124 ] || verdict="${red}FAILED${plain} (it hung: more than $(limit_of $(($2 - 1))) s)"
    printf '%s%2d.%s %s in %s: %s\n' "$bold" "$2" "$plain" "$verdict" "$(minutes "$took")" "${step_names[$2 - 1]}"
    grep -aihE '\bskipped\b' "$log" | grep -avE '\b0 skipped|skipped:? 0|test result' | cut -c 1-160 | sort -u | head -n 20 | sed 's/^ */      /' || true
    if [ "$code" != 0 ] || [ -n "${VERBOSE:-}" ]; then
        local lines=80
        [ -z "${VERBOSE:-}" ] || lines=+1
        printf '    from %s:\n' "$log"
        tail -n $lines "$log" | sed 's/^/    | /'
    fi
}

# The few lines of a failed step that say most: of a long run often only the end is kept.
tell_why() { # LOG
    local says='not ok |error: |Error: |panicked at|assert|\bFAILED\b|^E  |✖|\*\*\* '
    local noise='^(--|\.\.\.|---)?$|duration_ms|[sS]ubtest|location:|stack: |type: .suite|code: .ERR_|failureType|Promise\.all'
    { grep -aEA 7 "$says" "$1" || tail -n 8 "$1"; } | sed 's/^ *//' | grep -aEv "$noise" | cut -c 1-140 | awk '!seen[$0]++' \
        | head -n 9 | sed 's/^/      /'
}

run_plan() {
    local title=$1 count=${#step_names[@]} planned=0 began=$SECONDS i lane lanes=() pids=()
    local logs=target/steps/$title
    rm -rf "$logs"
    mkdir -p "$logs"
    trap "end_all $logs" EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    # Of steps side by side the longer lane counts.
    local -A of_lane=()
    local longest=0
    for ((i = 0; i <= count; i++)); do
        if [ -z "${step_lanes[i]:-}" ]; then
            planned=$((planned + longest + ${step_seconds[i]:-0})) longest=0 of_lane=()
        else
            lane=${step_lanes[i]}
            of_lane[$lane]=$((${of_lane[$lane]:-0} + step_seconds[i]))
            [ ${of_lane[$lane]} -le $longest ] || longest=${of_lane[$lane]}
        fi
    done
    printf '%s%s: %d steps, about %s minutes the first time on two cores%s\n' "$bold" "$title" "$count" "$(minutes $planned)" "$plain"
    for ((i = 0; i < count; i++)); do
        printf '%3d. %5s  %s%s\n' $((i + 1)) "$(minutes "${step_seconds[i]}")" "${step_names[i]}" "${step_lanes[i]:+ (beside others)}"
    done

    for ((i = 0; i < count; i++)); do
        local -A steps_of=()
        if [ -z "${step_lanes[i]}" ]; then
            steps_of[only]=$i
        else
            while [ -n "${step_lanes[i]:-}" ]; do steps_of[${step_lanes[i]}]+=" $i" i=$((i + 1)); done
            i=$((i - 1))
        fi
        pids=()
        for lane in "${!steps_of[@]}"; do
            # shellcheck disable=SC2086
            run_lane "$logs" ${steps_of[$lane]} &
            pids+=($!)
        done
        local said=$SECONDS begun
        while :; do
            sleep 0.3
            local running=() alive=
            for pid in "${pids[@]}"; do ! kill -0 "$pid" 2>/dev/null || alive=yes; done
            [ ! -t 1 ] || printf '\r\033[2K'
            for begun in "$logs"/*.log; do
                [ -e "$begun" ] || continue
                begun=$(basename "$begun" .log)
                if [ ! -e "$logs/$begun.end" ]; then
                    running+=("$begun")
                elif [ ! -e "$logs/$begun.told" ]; then
                    : >"$logs/$begun.told"
                    tell_end "$logs" "$begun"
                fi
            done
            [ -n "$alive" ] || break
            if [ ${#running[@]} -gt 0 ] && { [ -t 1 ] || [ $((SECONDS - said)) -ge 30 ]; }; then
                said=$SECONDS
                local line="   $(minutes $((SECONDS - began))) of about $(minutes $planned)"
                for begun in "${running[@]}"; do
                    line+=" | $begun. $(last_line "$logs/$begun.log")"
                done
                if [ -t 1 ]; then printf '%s' "${line:0:$(tput cols 2>/dev/null || echo 120)}"; else printf '%s\n' "$line"; fi
            fi
        done
        [ -n "${KEEP_GOING:-}" ] || ! grep -qsv '^0 ' "$logs"/*.end || break
    done

    local passed=0 failed=0 code took verdict
    printf '\n%s%s%s\n' "$bold" "$title" "$plain"
    for ((i = 0; i < count; i++)); do
        code=- took=0 verdict='not run'
        [ ! -e "$logs/$((i + 1)).end" ] || read -r code took <"$logs/$((i + 1)).end"
        case $code in
            -) ;;
            0) verdict=passed passed=$((passed + 1)) ;;
            *) verdict=FAILED failed=$((failed + 1)) ;;
        esac
        printf '%3d. %5s  %-7s %s\n' $((i + 1)) "$(minutes "$took")" "$verdict" "${step_names[i]}"
    done
    for ((i = 1; i <= count; i++)); do
        grep -qsv '^0 ' "$logs/$i.end" || continue
        printf '%s%2d. failed:%s %s\n' "$red" "$i" "$plain" "${step_names[i - 1]}"
        tell_why "$logs/$i.log"
    done
    printf 'in %s minutes\n%s: %d passed, %d failed\n' "$(minutes $((SECONDS - began)))" "$title" $passed $failed
    [ $((passed)) -eq "$count" ]
}
