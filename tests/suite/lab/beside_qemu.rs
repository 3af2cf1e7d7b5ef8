// SPDX-License-Identifier: Apache-2.0

//! A Debian under Portcullis beside the same Debian under QEMU, in the same run: the time to its login prompt, the speed of its
//! disk and of its network.
//!
//! Both have a virtual processor, the same memory, kernel and initramfs, a copy of the disk each, a scratch disk, and a tap on the
//! same bridge. Both use the host's page cache for disks. QEMU runs as a careful user would: its disks have an I/O thread, and
//! its NIC no option ROM, which the firmware would start.
//!
//! Times are good only as ratios here. The measurements are short and alternate, so that a busy moment of the machine
//! below the lab falls on both, and medians are compared.

mod qemu;

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use api::types::VmAction;
use serde_json::json;
use tempfile::TempDir;

use self::qemu::Qemu;
use super::FAST;
use crate::fixture::{
    Agent, Guest, Options,
    agent::{PATIENCE, binary, test_binary},
    host,
};

const BRIDGE: &str = "br-beside";
const HOST: &str = "192.168.97.1/24";
/// The interfaces of the two guests: the address of Ethernet, and that of IP.
const OURS: (&str, &str) = ("02:00:00:00:0b:02", "192.168.97.2");
const QEMUS: (&str, &str) = ("02:00:00:00:0b:03", "192.168.97.3");
/// The port of `guest-meter`.
const PORT: u16 = 7000;
/// The most boots of each VMM, of which the faster one counts. Each takes half a minute, so that only a boot that was too slow
/// has another one.
const BOOTS: usize = 2;
/// The share of QEMU's time to the prompt for a name that is the goal, and the share at which the test fails. Most of that time
/// is the guest's own work, which both do alike.
const LOGIN_GOAL: f64 = 0.8;
const LOGIN_LIMIT: f64 = 1.4;
/// The share of QEMU's time to the guest's first process at which the test fails: its firmware runs before the kernel.
const INIT_LIMIT: f64 = 1.2;

/// Measurements of each VMM and kind.
const ROUNDS: usize = 9;
/// The most series of them.
const SERIES: usize = 3;
/// The length of a measurement.
const ROUND: Duration = Duration::from_millis(300);
/// Marks of a boot on the console: the first process, and the prompt for a name.
const MARKS: [&str; 2] = ["portcullis-guest: init reached", "login: "];
/// The memory of a guest, and the size of its scratch disk.
const MEMORY: &str = "512M";
const SCRATCH: u64 = 64 << 20;

/// The kernel's command line behind `console=ttyS0 quiet`. cloud-init has no work here and would take a third of the boot, and
/// without it the SSH server has no keys.
fn cmdline() -> String {
    format!("{FAST} cloud-init=disabled systemd.mask=ssh.service")
}

/// The time of each of [`MARKS`], in seconds.
type Times = [f64; 2];

/// Runs the system on the first disk, with `guest-meter` and its units. All that is in memory: the disk stays as it is.
const INIT: &str = "#!/bin/sh
mkdir -p /system
mount -t ext4 /dev/vda /system || exec sh
umount /run /dev/pts
mount -t tmpfs -o mode=755 tmpfs /system/run
cp -r /meter/. /system/run/
mkdir /system/run/systemd/system/multi-user.target.wants
ln -s ../guest-meter.service /system/run/systemd/system/multi-user.target.wants/
exec switch_root /system /sbin/init
";

/// A directory for the test's files and the bridge, which go with this value.
struct Host(TempDir);

impl Host {
    fn new() -> Self {
        let host = Self(TempDir::new().unwrap());
        host::run("ip", &["link", "add", BRIDGE, "type", "bridge"]);
        host::run("ip", &["address", "add", HOST, "dev", BRIDGE]);
        host::run("ip", &["link", "set", BRIDGE, "up"]);
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// An initramfs that starts `guest-meter` in the system on the guest's disk, and gives the guest its address.
    fn initramfs(&self) -> PathBuf {
        let meter = self.path("meter");
        for part in ["system", "network"] {
            fs::create_dir_all(meter.join("systemd").join(part)).unwrap();
        }
        let unit = format!("[Service]\nExecStart=/run/guest-meter {PORT}\n");
        fs::write(meter.join("systemd/system/guest-meter.service"), unit).unwrap();
        for (name, (mac, address)) in [("ours", OURS), ("qemus", QEMUS)] {
            let network = format!("[Match]\nMACAddress={mac}\n[Network]\nAddress={address}/24\n");
            fs::write(meter.join(format!("systemd/network/00-{name}.network")), network).unwrap();
        }
        fs::copy(host::meter_program(), meter.join("guest-meter")).unwrap();
        let init = self.path("init");
        fs::write(&init, INIT).unwrap();
        host::initramfs_for_disk_with("beside-qemu", &init, &[&format!("{}:/meter", meter.display())])
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = std::process::Command::new("ip").args(["link", "delete", BRIDGE]).status();
    }
}

/// Makes a fresh copy of the disk with Debian, and an empty disk.
fn make_disks(system: &Path, scratch: &Path) {
    host::run("cp", &["--sparse=always", host::DEBIAN, system.to_str().unwrap()]);
    // A file without holes: its blocks exist before the first measurement.
    fs::write(scratch, vec![0xa5; usize::try_from(SCRATCH).unwrap()]).unwrap();
}

/// The VM under Portcullis.
fn create(agent: &Agent, initramfs: &Path) {
    let disk = |id: &str| json!({ "id": id, "path": format!("{id}.raw"), "format": "raw" });
    let spec = json!({
        "name": "web1",
        "cpus": 1,
        "memory": format!("{MEMORY}iB"),
        "entropy": true,
        "boot": {
            "kernel": agent.link_image("vmlinuz", &host::kernel(false)),
            "initramfs": agent.link_image("initrd-beside-qemu", initramfs),
            "cmdline": format!("console=ttyS0 quiet {}", cmdline()),
        },
        "disks": [disk("system"), disk("scratch")],
        "nics": [{ "id": "mgmt0", "bridge": BRIDGE, "mac": OURS.0 }],
    });
    agent.create(&spec).unwrap();
}

/// The times from the command to the guest's first process, and to the prompt for a name, in seconds.
fn boot_ours(agent: &Agent) -> Times {
    let disks = agent.directory().join("disks");
    make_disks(&disks.join("system.raw"), &disks.join("scratch.raw"));
    let begun = Instant::now();
    agent.act("web1", VmAction::Boot).unwrap();
    let mut guest = Guest::new(agent, "web1".to_owned());
    MARKS.map(|mark| {
        guest.wait_for(mark);
        begun.elapsed().as_secs_f64()
    })
}

/// Prints the times of all boots. Returns the ratio of the best ones, for each of [`MARKS`].
fn ratios(ours: &[Times], qemus: &[Times]) -> Times {
    let least =
        |times: &[Times], index: usize| times.iter().map(|one| one[index]).fold(f64::INFINITY, f64::min);
    println!("boots, s to init and to login: {ours:.1?}, QEMU {qemus:.1?}");
    let ratios = [0, 1].map(|index| least(ours, index) / least(qemus, index));
    println!("boot: ratio of the times to init {:.2}, to login {:.2}", ratios[0], ratios[1]);
    ratios
}

/// Sends a request to the `guest-meter` at an address. It may not serve yet.
fn request(address: &str, line: &str) -> TcpStream {
    let deadline = Instant::now() + PATIENCE / 4;
    loop {
        match TcpStream::connect((address, PORT)) {
            Ok(mut stream) => {
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream.set_write_timeout(Some(PATIENCE)).unwrap();
                writeln!(stream, "{line}").unwrap();
                return stream;
            }
            Err(error) => assert!(Instant::now() < deadline, "{address} does not answer: {error}"),
        }
        thread::sleep(Duration::from_millis(200));
    }
}

/// The two numbers of a response.
fn numbers(stream: &mut TcpStream) -> [f64; 2] {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let numbers: Vec<f64> = text.split_whitespace().map(|word| word.parse().unwrap()).collect();
    numbers.try_into().unwrap_or_else(|_| panic!("the response is {text:?}"))
}

/// A kind of measurement in a guest.
#[derive(Clone, Copy)]
enum Kind {
    /// Direction, order, bytes of a request, requests at once.
    Disk(&'static str, &'static str, u32, u32),
    /// A TCP connection, whose bytes go to the host.
    ToHost,
    /// Likewise, to the guest.
    ToGuest,
}

impl Kind {
    /// The least share of QEMU's speed to reach.
    fn goal(self) -> f64 {
        match self {
            Self::Disk(..) => 0.9,
            Self::ToHost | Self::ToGuest => 0.8,
        }
    }

    /// The share below which the test fails: the noise of a lab that compiles beside it does not get there.
    fn limit(self) -> f64 {
        self.goal() * 0.75
    }

    /// Measures a guest once. The result is in MB/s.
    fn measure(self, address: &str) -> f64 {
        let milliseconds = ROUND.as_millis();
        match self {
            Self::Disk(direction, order, len, depth) => {
                let line = format!("disk /dev/vdb {direction} {order} {len} {depth} {milliseconds}");
                let [count, nanoseconds] = numbers(&mut request(address, &line));
                count * f64::from(len) * 1000.0 / nanoseconds
            }
            Self::ToHost => {
                let mut stream = request(address, &format!("send {milliseconds}"));
                let mut portion = vec![0; 128 << 10];
                let (mut bytes, mut begun) = (0, None);
                loop {
                    match stream.read(&mut portion).unwrap() {
                        0 => break,
                        more => bytes += more,
                    }
                    begun.get_or_insert_with(Instant::now);
                }
                bytes as f64 / begun.unwrap().elapsed().as_secs_f64() / 1e6
            }
            Self::ToGuest => {
                let mut stream = request(address, "take");
                let portion = vec![0x5a; 128 << 10];
                let end = Instant::now() + ROUND;
                while Instant::now() < end {
                    stream.write_all(&portion).unwrap();
                }
                stream.shutdown(Shutdown::Write).unwrap();
                let [bytes, nanoseconds] = numbers(&mut stream);
                bytes * 1000.0 / nanoseconds
            }
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Disk(direction, order, len, depth) => {
                write!(f, "disk, {order} {direction} of {} KiB, depth {depth}", len >> 10)
            }
            Self::ToHost => write!(f, "TCP to the host"),
            Self::ToGuest => write!(f, "TCP to the guest"),
        }
    }
}

/// The value in the middle.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Measures both guests in turn, again if the result is below the limit: other work on the machine can spoil a series. Returns
/// the best ratio.
fn best_ratio(kind: Kind) -> f64 {
    let mut best: f64 = 0.0;
    for _ in 0..SERIES {
        best = best.max(ratio(kind));
        if best >= kind.limit() {
            break;
        }
    }
    best
}

/// Measures both guests in turn. Returns the ratio of the medians.
fn ratio(kind: Kind) -> f64 {
    // The first one also fills caches.
    kind.measure(OURS.1);
    kind.measure(QEMUS.1);
    let (mut ours, mut qemus): (Vec<f64>, Vec<f64>) =
        (0..ROUNDS).map(|_| (kind.measure(OURS.1), kind.measure(QEMUS.1))).unzip();
    let (ours, qemus) = (median(&mut ours), median(&mut qemus));
    println!("{kind}: {ours:.1} MB/s, QEMU {qemus:.1} MB/s, ratio {:.2}", ours / qemus);
    ours / qemus
}

#[test]
fn a_debian_boots_reads_writes_and_talks_about_as_fast_as_under_qemu() {
    let test_host = Host::new();
    let initramfs = test_host.initramfs();
    let arguments = vec![format!("--interface={BRIDGE}")];
    let agent = Agent::start_with(Options { arguments, ..Options::default() });
    create(&agent, &initramfs);
    // The lab reads this program over the network once, as it has read ours.
    host::run("qemu-system-x86_64", &["--version"]);

    let (mut ours, mut qemus) = (Vec::new(), Vec::new());
    let (_qemu, [to_init, to_login]) = loop {
        ours.push(boot_ours(&agent));
        // It keeps still while the other one boots.
        agent.act("web1", VmAction::Pause).unwrap();
        let (qemu, took) = Qemu::boot(&test_host, &initramfs);
        qemus.push(took);
        let [to_init, to_login] = ratios(&ours, &qemus);
        if ours.len() == BOOTS || (to_init <= INIT_LIMIT && to_login <= LOGIN_LIMIT) {
            break (qemu, [to_init, to_login]);
        }
        agent.act("web1", VmAction::Stop).unwrap();
    };
    agent.act("web1", VmAction::Resume).unwrap();

    let disk =
        |order, len, depth| ["read", "write"].map(|direction| Kind::Disk(direction, order, len, depth));
    let kinds = [1, 32].map(|depth| [disk("sequential", 128 << 10, depth), disk("random", 4 << 10, depth)]);
    let kinds = kinds.into_iter().flatten().flatten().chain([Kind::ToHost, Kind::ToGuest]);
    let measured: Vec<(Kind, f64)> = kinds.map(|kind| (kind, best_ratio(kind))).collect();

    let missed = |times_limit: f64, limit: fn(Kind) -> f64| {
        let late = (to_login > times_limit).then(|| format!("login ({to_login:.2} of QEMU's time)"));
        let slow = measured.iter().filter(|(kind, ratio)| *ratio < limit(*kind));
        late.into_iter()
            .chain(slow.map(|(kind, ratio)| format!("{kind} ({ratio:.2} of QEMU's speed)")))
            .collect()
    };
    let goals: Vec<String> = missed(LOGIN_GOAL, Kind::goal);
    println!("goals missed: {goals:?}");
    // The agent for tests alone is a build of the development profile: it is measured, and not held to be fast.
    if binary() == test_binary() {
        return;
    }
    let mut limits: Vec<String> = missed(LOGIN_LIMIT, Kind::limit);
    if to_init > INIT_LIMIT {
        limits.push(format!("first process ({to_init:.2} of QEMU's time)"));
    }
    assert!(limits.is_empty(), "far slower than QEMU: {limits:?}");
}
