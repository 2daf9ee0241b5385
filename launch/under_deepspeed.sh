# `under_deepspeed ARGUMENT …` runs deepspeed with only the output of training, and returns its exit code.
# A signal to this script, from a supervisor or Ctrl-C, is forwarded only to the training processes: DeepSpeed's launcher
# would kill a process that still writes a checkpoint after 30 s. Deepspeed therefore has its own process group, which
# the terminal does not signal.
under_deepspeed() {
    local deepspeed code name
    set -m
    deepspeed --log_level critical "$@" </dev/null &
    deepspeed=$!
    set +m
    # shellcheck disable=SC2064
    for name in TERM USR1 QUIT; do trap "passing=yes; pass_on $name $deepspeed" "$name"; done
    # TERM instead of INT, on which Python prints a traceback if it is starting. HUP: the terminal is closed.
    # shellcheck disable=SC2064
    trap "passing=yes; pass_on TERM $deepspeed" INT HUP
    passing=yes
    while [ -n "$passing" ]; do # a signal ends `wait` early
        passing='' code=0
        wait "$deepspeed" || code=$?
    done
    trap - TERM USR1 QUIT INT HUP
    # The launcher exits with the negative number of the signal.
    [ "$code" -lt 192 ] || printf '%s: a training process was killed by signal %s\n' "${0##*/}" "$((256 - code))" >&2
    return "$code"
}

pass_on() {
    python -c 'import signal, sys, psutil
deepspeed = psutil.Process(int(sys.argv[2]))
launchers = deepspeed.children()
training = [process for launcher in launchers for process in launcher.children()]
for process in training or [*launchers, deepspeed]:
    process.send_signal(signal.Signals["SIG" + sys.argv[1]])' "$1" "$2" 2>/dev/null || true # it may have exited
}
