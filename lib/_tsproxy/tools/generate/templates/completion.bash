# tsproxy __VERSION__: completion of its command line, for bash, and for zsh by bashcompinit.
#
# Make:   tsproxy.py generate completion > /etc/bash_completion.d/tsproxy
#         zsh: autoload -U +X compinit bashcompinit && compinit && bashcompinit && . /etc/bash_completion.d/tsproxy
# Try:    . /etc/bash_completion.d/tsproxy; tsproxy generate <Tab><Tab>
# Undo:   rm /etc/bash_completion.d/tsproxy
# shellcheck shell=bash

_tsproxy() {
    local word=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]} option='' prefix='' given='' words='' at
    COMPREPLY=()
    # --name=value is three words to bash, since = breaks them, and one to zsh.
    case $word in
    =) option=$previous word='' ;;
    --*=*) option=${word%%=*} prefix=${word%%=*}= word=${word#*=} ;;
    *) if [[ $previous == = ]]; then option=${COMP_WORDS[COMP_CWORD - 2]}; else option=$previous; fi ;;
    esac
    for ((at = 1; at < COMP_CWORD; at++)); do
        case ${COMP_WORDS[at]} in
        __WORDS__) given="$given${given:+ }${COMP_WORDS[at]}" ;;
        esac
    done
    case $option in
    # __VALUES__
    *)
        case $given in
        # __GIVEN__
        esac
        ;;
    esac
    if [[ " $words " == *" FILE "* && $word != -* ]]; then
        if type compopt >/dev/null 2>&1; then compopt -o default && return; fi # as readline does it; zsh has no compopt
        words=$(compgen -f -- "$word")
    fi
    # shellcheck disable=SC2207 # no word of ours has a blank, and zsh has no mapfile
    COMPREPLY=($(compgen -P "$prefix" -W "$words" -- "$word"))
}

complete -F _tsproxy tsproxy tsproxy.py
