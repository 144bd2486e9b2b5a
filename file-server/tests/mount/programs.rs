//! Programs that people run in their directories.

use std::fs;

use crate::Case;
use crate::host::{Mounted, run};

pub(crate) const CASES: &[Case] = &[
    ("git clones, checks out and agrees with itself", git),
    ("SQLite keeps its journals and its write-ahead log", sqlite),
    ("tar unpacks and packs a tree as it was", tar),
    ("both sides write at the same time and nothing is lost", both_write),
];

fn git(m: &Mounted) {
    let source = m.folder.path().join("source");
    fs::create_dir(&source).unwrap();
    run(&source, &["git", "init", "-q", "-b", "main"]);
    for number in 0..300 {
        let directory = source.join(format!("d{}", number % 20));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(format!("f{number}")), format!("{number}\n").repeat(number)).unwrap();
    }
    run(&source, &["git", "add", "."]);
    run(&source, &["git", "commit", "-qm", "one"]);
    run(&source, &["git", "checkout", "-qb", "other"]);
    run(
        &source,
        &["sh", "-c", "for f in d*/f*; do echo more >> $f; done; git mv d1 moved; git commit -qam two"],
    );
    let clone = m.inside.join("clone");
    run(&m.inside, &["git", "clone", "-q", source.to_str().unwrap(), "clone"]);
    assert_eq!(run(&clone, &["git", "status", "--porcelain"]), "");
    run(&clone, &["git", "checkout", "-q", "main"]);
    assert_eq!(run(&clone, &["git", "status", "--porcelain"]), "");
    run(&clone, &["git", "checkout", "-q", "other"]);
    run(
        &clone,
        &["sh", "-c", "echo x > new && git add new && git commit -qm three && git gc -q && git fsck"],
    );
    // The host's git agrees.
    assert_eq!(run(&m.outside.join("clone"), &["git", "status", "--porcelain"]), "");
    run(&m.outside.join("clone"), &["git", "fsck"]);
}

fn sqlite(m: &Mounted) {
    let script = r"
import sqlite3, sys, threading
for mode in ('wal', 'delete'):
    path = f'{sys.argv[1]}/{mode}.db'
    db = sqlite3.connect(path)
    assert db.execute(f'pragma journal_mode={mode}').fetchone()[0] == mode
    db.execute('create table t (n integer)')
    db.commit()
    def work():
        mine = sqlite3.connect(path, timeout=60)
        for n in range(50):
            with mine:
                mine.execute('insert into t values (?)', (n,))
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert db.execute('select count(*), sum(n) from t').fetchone() == (200, 4900)
    assert db.execute('pragma integrity_check').fetchone()[0] == 'ok'
    db.close()
";
    run(&m.inside, &["python3", "-c", script, m.inside.to_str().unwrap()]);
    let check = "import sqlite3,sys\nfor m in ('wal','delete'): assert sqlite3.connect(f'{sys.argv[1]}/{m}.db').execute('select count(*) from t').fetchone()[0] == 200";
    run(&m.outside, &["python3", "-c", check, m.outside.to_str().unwrap()]);
}

fn tar(m: &Mounted) {
    let make = r"
mkdir -p tree/deep/er tree/empty; cd tree
for i in $(seq 1 1500); do echo $i > deep/f$i; done
ln -s deep/f1 link; ln deep/f2 hard; mkfifo pipe; truncate -s 1M sparse; echo end >> sparse
chmod 4755 deep/f3; chmod 2770 empty; chown 12:34 deep/f4 deep/er; touch -d @1000000000 deep/f5
cd ..; tar --format=posix --sparse -cf tree.tar tree
";
    let host = m.folder.path();
    run(host, &["sh", "-ec", make]);
    run(&m.inside, &["tar", "-xpf", host.join("tree.tar").to_str().unwrap()]);
    let list = "find tree -printf '%p %y %m %U %G %n %s %T@ %l\\n' | sort";
    let dirless = |text: String| -> Vec<String> {
        // The size of a directory is its file system's own affair, and links have no owner of their own where the server is a user.
        text.lines()
            .map(|line| {
                let mut words: Vec<&str> = line.split(' ').collect();
                if words[1] == "d" {
                    words[6] = "";
                }
                words.join(" ")
            })
            .collect()
    };
    let (inside, made) =
        (dirless(run(&m.inside, &["sh", "-c", list])), dirless(run(host, &["sh", "-c", list])));
    assert_eq!(inside.len(), made.len());
    for (inside, made) in inside.iter().zip(&made) {
        assert_eq!(inside, made);
    }
    run(&m.inside, &["tar", "--format=posix", "-cf", host.join("again.tar").to_str().unwrap(), "tree"]);
    run(host, &["tar", "-df", "again.tar"]);
    run(&m.inside, &["rm", "-rf", "tree"]);
}

fn both_write(m: &Mounted) {
    // Each side replaces files in the way of editors and package managers, and reads what the other has: it is always a whole file.
    let replace = |directory: std::path::PathBuf, word: &'static str| {
        std::thread::spawn(move || {
            for number in 0..300 {
                let name = directory.join(format!("f{}", number % 10));
                let new = directory.join(format!(".{word}"));
                fs::write(&new, format!("{word} {number}\n").repeat(1000)).unwrap();
                fs::rename(&new, &name).unwrap();
                let text = fs::read_to_string(&name).unwrap();
                let first = text.lines().next().unwrap_or_else(|| panic!("{name:?} is empty"));
                assert!(text.lines().all(|line| line == first), "{name:?} is mixed");
                assert_eq!(text.lines().count(), 1000);
            }
        })
    };
    for thread in [replace(m.inside.clone(), "inside"), replace(m.outside.clone(), "outside")] {
        thread.join().unwrap();
    }
}
