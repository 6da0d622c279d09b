# Answers --help with the comment at the top of the script that sources this file, before anything is set up.
case " $* " in *" --help "*|*" -h "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
