# `under_deepspeed ARGUMENT …` runs deepspeed, with nothing said but what training says, and returns the exit code.
# A signal that this script gets, from a supervisor or by Ctrl-C, goes on to the training processes, and to none of
# DeepSpeed's own: its launcher would kill after 30 s what still writes a checkpoint. So deepspeed has a process group
# of its own, which a terminal sends nothing to.
under_deepspeed() {
    local deepspeed code name
    set -m
    deepspeed --log_level critical "$@" </dev/null &
    deepspeed=$!
    set +m
    # shellcheck disable=SC2064
    for name in TERM USR1 QUIT; do trap "passing=yes; pass_on $name $deepspeed" "$name"; done
    # Python has a traceback for an INT that comes while it starts. HUP: the terminal is closed.
    # shellcheck disable=SC2064
    trap "passing=yes; pass_on TERM $deepspeed" INT HUP
    passing=yes
    while [ -n "$passing" ]; do # a signal ends `wait` early
        passing='' code=0
        wait "$deepspeed" || code=$?
    done
    trap - TERM USR1 QUIT INT HUP
    # The launcher exits with minus the signal's number.
    [ "$code" -lt 192 ] || printf '%s: a training process was ended by signal %s\n' "${0##*/}" "$((256 - code))" >&2
    return "$code"
}

pass_on() {
    python -c 'import signal, sys, psutil
deepspeed = psutil.Process(int(sys.argv[2]))
launchers = deepspeed.children()
training = [process for launcher in launchers for process in launcher.children()]
for process in training or [*launchers, deepspeed]:
    process.send_signal(signal.Signals["SIG" + sys.argv[1]])' "$1" "$2" 2>/dev/null || true # it has ended by now
}
